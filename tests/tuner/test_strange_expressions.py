"""Names and regular expressions in the config of an adapter that somebody else made."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model

import paca
from models import adapt, llama
from paca.tuner import strange_expressions
from paca.tuner.bounded_process import BoundedProcess, TookTooLong, WorkFailed

EXPLODES = "(.+)+!"
SETTINGS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": EXPLODES},
    "exclude_modules": {"exclude_modules": EXPLODES},
    "rank_pattern": {"rank_pattern": {EXPLODES: 2}},
    "alpha_pattern": {"alpha_pattern": {EXPLODES: 2}},
    "indices": {"indices": {EXPLODES: [1, 2]}},
    "modules_to_save": {"modules_to_save": [EXPLODES]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": [EXPLODES]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapt(llama(), target_modules=["q_proj", "down_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strange_expressions, "SECONDS", 0.05)


def changed(saved: Path, folder: Path, **settings: Any) -> Path:
    """The adapter with other settings."""
    config = json.loads((saved / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_expression_that_explodes_is_refused(saved: Path, tmp_path: Path, setting: str) -> None:
    folder, model = changed(saved, tmp_path, **SETTINGS[setting]), llama()
    with pytest.raises(ValueError, match=f"in {setting} takes too long") as raised:
        PeftModel.from_pretrained(model, folder)
    assert str(folder) in str(raised.value)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


REFUSED: dict[str, dict[str, Any]] = {
    "20,000 names": {"target_modules": [f"name{number}" for number in range(20_000)]},
    "the longest of 5,000 characters": {"target_modules": ["q" * 5_000]},
    "nor a regular expression": {"target_modules": "(" * 3_000 + ")" * 3_000},
    "regular expressions, such as": {"target_modules": "|".join(f"(a{number}|b)" for number in range(3_000))},
    "is no regular expression": {"rank_pattern": {"(?i)q_proj": 3}},
    "modules_to_save has the key": {"modules_to_save": ["[", "lm_head"]},
    "flat mapping": {"auto_mapping": {"a": [[1]]}},
    "base_model_name_or_path must be": {"base_model_name_or_path": 5},
    "revision must be": {"revision": [1]},
    "selection must be": {"selection": "x" * 10_000},
    "a saved adapter has its columns": {"original_weights": "somebody/model"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_are_no_adapters(saved: Path, tmp_path: Path, message: str) -> None:
    folder = changed(saved, tmp_path, **REFUSED[message])
    with pytest.raises(ValueError, match=message) as raised:
        PeftModel.from_pretrained(llama(), folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 2_000


@pytest.mark.filterwarnings("ignore:The following alpha_pattern")
def test_expressions_and_long_lists_that_end_are_fine(saved: Path, tmp_path: Path) -> None:
    usual: list[dict[str, Any]] = [
        {"target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "down_proj", *(f"name{number}" for number in range(2_000))]},
        {"rank_pattern": {r".*\.q_proj": 3, "down_proj": 3}, "r": 2},
        {"alpha_pattern": {f"^model.layers.{number}.mlp": 6 for number in range(400)}},
    ]
    for settings in usual:
        model = PeftModel.from_pretrained(llama(), changed(saved, tmp_path, **settings))
        assert len([name for name, _ in model.named_parameters() if "paca_delta" in name]) == 4


def test_a_hot_swap_and_a_second_adapter_try_them_too(saved: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(llama(), saved)
    folder = changed(saved, tmp_path, **SETTINGS["alpha_pattern"])
    with pytest.raises(ValueError, match="takes too long"):
        paca.hotswap_adapter(model, folder, "default")
    with pytest.raises(ValueError, match="takes too long"):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"]


def test_ones_own_settings_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strange_expressions, "_process", lambda: pytest.fail("started"))
    config = paca.PacaConfig(r=2, target_modules=r".*\.(q|k)_proj", rank_pattern={"k_.*": 3})
    inject_adapter_in_model(config, llama())


WORK = """
def work(request):
    if request == "loop":
        while True:
            pass
    return "x" * request
"""


def test_a_process_that_was_ended_is_followed_by_another() -> None:
    process = BoundedProcess(WORK)
    assert process.ask(3) == "xxx"
    for bad in ("loop", 2**36):
        with pytest.raises(TookTooLong):
            process.ask(bad, 0.05)
        assert process.ask(2) == "xx"
    for wrong, message in (({}, "TypeError"), (2**25, "too long")):
        with pytest.raises(WorkFailed, match=message):
            process.ask(wrong)
    process.close()


def test_a_process_serves_threads_and_is_not_shared_with_a_fork() -> None:
    process, answers = BoundedProcess(WORK), []
    threads = [threading.Thread(target=lambda n=n: answers.append(process.ask(n))) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(map(len, answers)) == list(range(8))
    child = os.fork()
    if child == 0:
        os._exit(0 if process.ask(5) == "xxxxx" else 1)
    assert process.ask(4) == "xxxx"
    assert os.waitpid(child, 0)[1] == 0
    process.close()


def test_nothing_of_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit")
    (tmp_path / "strange.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.syspath_prepend(str(tmp_path))
    process = BoundedProcess("def work(request):\n    import strange")
    with pytest.raises(WorkFailed, match="No module named 'strange'"):
        process.ask(1)
    process.close()

"""Models and adapters of the hub, loaded for answering by their ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from data.loopback_hub import serving
from paca.cli import app
from paca.cli.chat_beside import SideBySide
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from tiny_checkpoint import save_run

TOKENS = torch.arange(2, 26).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


def cached(cache: Path, name: str) -> Path:
    """Where a repository of this name lies in the hub's cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    return repository / "snapshots" / "0123"


def test_a_plain_model_may_be_a_hub_id_and_a_run_that_is_missing_is_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "base", cached(tmp_path, "tiny/llama"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    loaded = load_for_generation("tiny/llama")
    assert (loaded.adapter, loaded.base) == (None, "tiny/llama")
    (tmp_path / "runs").mkdir()
    with pytest.raises(PacaError, match="No such folder: runs/lama"):
        load_for_generation("runs/lama")


def test_an_adapter_may_be_a_hub_id(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = shutil.copytree(run / "adapter", tmp_path / "repository")
    (repository / "checkpoint-1").mkdir()
    (repository / "checkpoint-1" / "config.json").write_text("{}")
    (repository / "optimizer.pt").write_text("large, and a pickle")
    monkeypatch.chdir(tmp_path)
    with serving(repository, "tiny/adapter", monkeypatch, tmp_path / "cache", "models"):
        loaded = load_for_generation("tiny/adapter")
    assert torch.equal(logits(loaded.model), logits(load_for_generation(run).model))
    assert loaded.adapter is not None
    assert loaded.adapter.is_relative_to(tmp_path / "cache")
    assert {file.name for file in loaded.adapter.rglob("*")}.isdisjoint({"checkpoint-1", "optimizer.pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load_for_generation("tiny/adapter").adapter == loaded.adapter  # from the cache


def test_an_adapter_and_a_model_of_the_hub_answer_side_by_side(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run / "adapter", cached(tmp_path, "tiny/adapter"))
    shutil.copytree(run / "base", cached(tmp_path, "tiny/llama"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def answers(path: str, beside: str) -> list[str]:
        both = SideBySide(path, beside, None, Console(quiet=True), max_new_tokens=12)
        both.ask("Hello")
        return [history[1]["content"] for history in both.histories]

    adapted, plain = answers(str(run), "base")
    assert adapted != plain
    assert answers("tiny/adapter", "base") == [adapted, plain]
    assert answers("tiny/llama", "tiny/adapter") == [plain, adapted]
    chat = ["chat", "tiny/adapter", "--beside", "tiny/none", "--prompt", "Hello"]
    told = CliRunner().invoke(app, chat)
    assert "'tiny/none'" in str(told.exception)  # not that it is no folder


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ({"peft_type": "SHADOW", "shadow_model": "somebody/else"}, "sets shadow_model"),
        (None, "is a link out of its folder"),
    ],
    ids=["another model", "link"],
)
def test_an_adapter_of_the_hub_is_checked_as_a_folder_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: dict[str, Any] | None, expected: str
) -> None:
    snapshot = cached(tmp_path, "tiny/adapter")
    shutil.copytree(run / "adapter", snapshot)
    if harm is None:
        (tmp_path / "secret").write_text("a key")
        (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    else:
        file = snapshot / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | harm))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PacaError, match=expected):
        load_for_generation("tiny/adapter")


def test_a_base_model_of_the_hub_that_holds_an_adapter_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would put it on, and nobody has checked it."""
    snapshot = cached(tmp_path, "tiny/both")
    shutil.copytree(run / "base", snapshot)
    shutil.copytree(run / "adapter", snapshot, dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PacaError, match="'tiny/both' on the hub holds an adapter, which nobody has checked"):
        load_for_generation(run / "adapter", base_model="tiny/both")

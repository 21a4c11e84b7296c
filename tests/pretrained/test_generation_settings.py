"""A generation_config.json that transformers refuses to save does not cost a run its result."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from paca.convert.merged import merge_to_folder
from paca.pretrained import load_pretrained
from paca.pretrained.generation_settings import make_savable
from paca.training import load_run_config, train
from tiny_checkpoint import save_base

GREEDY = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


def save_model(folder: Path, **settings: Any) -> Path:
    save_base(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("method", ["full", "paca"])
def test_a_run_and_a_merge_end_well(tmp_path: Path, method: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    text = f"model: {{name: {save_model(tmp_path / 'model', **GREEDY)}}}\ndata: {{train: {tmp_path / 'train.jsonl'}}}\n"
    text += f"{method}: {{{'r: 4' if method == 'paca' else ''}}}\noutput: {{dir: {tmp_path / 'run'}}}\n"
    (tmp_path / "run.yaml").write_text(f"{text}train: {{max_steps: 2, save_steps: 1, max_length: 32}}\n")
    result = train(load_run_config(tmp_path / "run.yaml"), console=Console(quiet=True))
    if method == "paca":
        merge_to_folder(result.folder, tmp_path / "merged", verify=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ("merged" if method == "paca" else "run/model"))
    assert not saved.generation_config.do_sample
    assert saved.generation_config.temperature in (None, 1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (GREEDY, "have no effect, and are not saved: temperature, top_p."),
        ({"output_scores": True, "length_penalty": 2.0}, "are not saved: length_penalty, output_scores."),
        ({"do_sample": True, "temperature": 0.9}, None),
    ],
)
def test_what_is_left_out_is_told_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], said: str | None
) -> None:
    folder = save_model(tmp_path / "model", **settings)
    model = load_pretrained(str(folder)).model
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())  # for chat
    with caplog.at_level(logging.WARNING, "paca"):
        make_savable(model, str(folder))
    lines = [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == model.config.eos_token_id
    assert said is not None or kept["temperature"] == 0.9

"""Another model under the name of the one that a run was trained on is told; the same one, however it lies, is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.pretrained import base_weights
from paca.pretrained.base_weights import KEY, RECORD, rows_of_weights
from paca.pretrained.generation import load_for_generation
from paca.pretrained.in_turn import ModelsInTurn
from tiny_checkpoint import byte_tokenizer, save_adapter, save_base

SAID = "is not the one that the adapter in"


def saved(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter on `model`, with what its run recorded."""
    monkeypatch.setattr(base_weights, "_told", set())
    save_base(tmp_path / "model")
    save_adapter(tmp_path / "run" / "adapter", tmp_path / "model")
    (tmp_path / "run" / RECORD).write_text(json.dumps({KEY: rows_of_weights(str(tmp_path / "model"))}))
    return tmp_path / "run"


def swap(run: Path) -> None:
    """Put a model with other values in the place of the run's."""
    folder = run.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    shutil.rmtree(folder)
    saved(model, folder)


def merged(run: Path) -> None:
    merge_to_folder(run, run.parent / "out", "bfloat16")  # loads twice


def exported(run: Path) -> None:
    export_adapter(run, run.parent / "out", "lora")


@pytest.mark.parametrize("job", [load_for_generation, merged, exported])
@pytest.mark.parametrize("given", ["run", "adapter"])
def test_another_model_in_the_place_of_the_base_is_told_once(
    run: Path, job: Callable[[Path], object], given: str, caplog: pytest.LogCaptureFixture
) -> None:
    swap(run)
    job(run if given == "run" else run / "adapter")
    assert [SAID in message for message in caplog.messages].count(True) == 1
    assert str(run.parent / "model") in caplog.text


def test_it_is_told_of_an_adapter_beside_another_and_of_a_checkpoint(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run / "adapter", run.parent / "other")
    checkpoint = shutil.copytree(run / "adapter", run / "checkpoints" / "checkpoint-5")
    swap(run)
    models = ModelsInTurn()
    models.load(run.parent / "other", beside=run)
    assert SAID not in caplog.text  # nobody knows
    for _ in range(2):
        models.load(run, beside=run.parent / "other")
    assert caplog.text.count(SAID) == 1
    load_for_generation(checkpoint)
    assert caplog.text.count(SAID) == 2


def test_the_base_as_it_was_is_not_told_of(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = run.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(base)
    bfloat16, sharded = run.parent / "bfloat16", run.parent / "sharded"
    saved(model, sharded, max_shard_size="20KB")
    assert len([*sharded.glob("*.safetensors")]) > 2
    saved(model.to(torch.bfloat16), bfloat16)
    (base / "model.safetensors").touch()
    moved = shutil.move(run, run.parent / "moved")
    for folder in (None, sharded, bfloat16):
        load_for_generation(moved, base_model=folder and str(folder))
    load_for_generation(moved, dtype="bfloat16")
    (moved / RECORD).write_text("{")
    load_for_generation(moved)
    assert SAID not in caplog.text


def test_a_given_base_is_compared(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(run.parent / "model", run.parent / "copy")
    swap(run)
    load_for_generation(run, base_model=str(run.parent / "copy"))
    assert SAID not in caplog.text
    load_for_generation(run)
    assert SAID in caplog.text


def test_what_has_no_safetensors_here_has_no_rows(tmp_path: Path) -> None:
    for name in ("owner/never-fetched", str(tmp_path / "gone")):
        assert rows_of_weights(name) is None
    save_base(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut")
    assert rows_of_weights(str(tmp_path / "model")) is None


def test_rows_of_many_tensors_are_some_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "model")
    every = rows_of_weights(str(tmp_path / "model"))
    monkeypatch.setattr(base_weights, "_TENSORS", 3)
    read = []
    rows = base_weights._rows
    monkeypatch.setattr(base_weights, "_rows", lambda file, tensors: (read.extend(tensors), rows(file, tensors))[1])
    assert rows_of_weights(str(tmp_path / "model")) != every
    assert len(read) == 3

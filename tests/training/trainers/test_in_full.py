"""Runs in full of a model that transformers saves under other names than it has: resumed, and at its best."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from paca.messages.errors import PacaError
from paca.training import load_run_config, train
from paca.training.folder import checkpoints
from training.tiny_run import rows

STEPS = ["train.save_steps=2", "train.save_total_limit=null", "train.eval_steps=2", "train.learning_rate=1e-3"]


def whole_model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def in_full(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in full of a model that transformers saves under other names; its config is `run.yaml` beside it."""
    folder = tmp_path_factory.mktemp("full")
    text = (workspace / "image_classification.yaml").read_text().replace("paca: {r: 4}", "full: {}")
    (folder / "run.yaml").write_text(text)
    train(load_run_config(folder / "run.yaml", [f"output.dir={folder / 'run'}", *STEPS]), console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("left", [2, 4])
def test_a_run_in_full_goes_on_with_the_weights_of_its_checkpoint(in_full: Path, tmp_path: Path, left: int) -> None:
    shutil.copytree(in_full / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > left:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").unlink()
    config = load_run_config(in_full / "run.yaml", [f"output.dir={tmp_path / 'run'}", *STEPS])
    train(config, resume=True, console=Console(quiet=True))
    expected, found = whole_model(in_full / "run"), whole_model(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected | found)
    assert any("encoder.layer.0" in name for name in found)  # of the original checkpoints, as stock tools expect


def test_the_best_checkpoint_of_a_run_in_full_is_the_result(in_full: Path, tmp_path: Path) -> None:
    best = ["train.load_best_model_at_end=true", "train.metric_for_best_model=loss", "train.greater_is_better=true"]
    config = load_run_config(in_full / "run.yaml", [f"output.dir={tmp_path / 'run'}", *STEPS, *best])
    summary = train(config, console=Console(quiet=True)).summary
    assert summary is not None
    losses = [row["eval_loss"] for row in rows(tmp_path / "run") if "eval_loss" in row][1:]
    assert losses[0] > losses[1]  # so that the best by this measure is not the last
    assert summary["eval_loss_after"] == losses[0]
    last, found = whole_model(in_full / "run"), whole_model(tmp_path / "run")
    assert not any(torch.equal(last[name], found[name]) for name in found if "attention" in name)


def test_a_checkpoint_with_the_names_of_other_tools_is_refused(
    in_full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run_config(in_full / "run.yaml", [f"output.dir={tmp_path / 'run'}", *STEPS])
    with monkeypatch.context() as before:
        before.setattr(checkpoints, "own_names", lambda model: nullcontext())
        train(config, console=Console(quiet=True))
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(PacaError, match=r"checkpoint-4 lacks \d+ weights of this model .* such as vit\.layers"):
        train(config, resume=True, console=Console(quiet=True))

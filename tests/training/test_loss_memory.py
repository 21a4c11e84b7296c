from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paca.lean import loss, token_log_probs
from paca.training import describe, load_run_config, train
from paca.training.run_setting import setting_of_run
from paca.training.trainers.sft import Sft

VOCABULARY = 259
HEAD = (32, VOCABULARY)  # the head's weight, transposed for its product


class LogitTensors(TorchDispatchMode):
    """The most positions whose logits one tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            shape = getattr(tensor, "shape", ())
            if len(shape) > 1 and shape[-1] == VOCABULARY and tuple(shape) != HEAD:
                self.positions = max(self.positions, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ((), False),
        (("train.loss_type=dft",), False),
        (("train.gradient_checkpointing=true", "model.lean=true"), False),
        (("train.label_smoothing_factor=0.1",), True),
    ],
)
def test_what_is_said_about_the_logits_is_what_happens(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], whole: bool
) -> None:
    tile = 8  # smaller than the tiny batches here, as a block of logits is smaller than real ones
    monkeypatch.setattr(token_log_probs, "ROWS", tile)
    monkeypatch.setattr(token_log_probs, "BLOCK", 1)
    batches: list[tuple[int, int]] = []

    class Watched(Sft.trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = inputs["input_ids"].numel()
            with LogitTensors() as seen:
                loss = super().training_step(model, inputs, *args, **kwargs)
            batches.append((seen.positions, tokens))
            return loss

    monkeypatch.setattr(Sft, "trainer", Watched)
    overrides = [f"output.dir={tmp_path / 'run'}", "train.max_steps=1", "data.eval=null", *settings]
    config = load_run_config(config_file, overrides)
    plan = describe(config)
    said = dict(plan.lines())["logits"]
    assert said.startswith("of a whole batch at once" if whole else "a part at a time")
    assert setting_of_run(plan.config, "cpu").chunked_loss is not whole
    train(config, console=Console(quiet=True))
    for positions, tokens in batches:
        assert tokens > 2 * tile
        assert (positions >= tokens - 2) if whole else (0 < positions <= tile)  # the last position predicts nothing


def test_a_run_projects_no_prompts(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[int] = []
    projected: list[int] = []

    class Watched(Sft.trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labelled = int((inputs["labels"][:, 1:] != -100).sum())
            assert labelled < inputs["labels"].numel() - inputs["labels"].shape[0]
            expected.append(labelled)
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            projected.append(hidden.shape[0])
            return token_log_probs.TokenLogProbs.apply(hidden, *rest)

    monkeypatch.setattr(Sft, "trainer", Watched)
    monkeypatch.setattr(loss, "TokenLogProbs", Counting)
    overrides = [f"output.dir={tmp_path / 'run'}", "train.max_steps=2"]
    train(load_run_config(config_file, overrides), console=Console(quiet=True))
    assert expected
    assert projected == expected

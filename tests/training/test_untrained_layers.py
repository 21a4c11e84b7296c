"""Layers whose weights a model reads without calling them: a run tells that they don't train."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from models import adapt
from paca.training.untrained_layers import TellUntrainedLayers


class Reads(nn.Module):
    """`called` runs as a layer; of `read` only the weight is used, as WavLM does it; `late` is left out at times."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.late = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: torch.Tensor, late: bool) -> torch.Tensor:
        y = nn.functional.linear(self.called(x), self.read.weight)
        return self.late(y) if late else y


def told(targets: list[str], steps: int, detach: bool = False, frozen: tuple[str, ...] = ()) -> str:
    """What a run of so many steps says; `late` runs in the third."""
    torch.manual_seed(0)
    model = adapt(Reads(), target_modules=targets)
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    stream = io.StringIO()
    callback: Any = TellUntrainedLayers(Console(file=stream))
    for step in range(steps):
        model.zero_grad()
        loss = model(torch.randn(3, 7), late=step == 2).sum()
        if not detach:
            loss.backward()
        callback.on_pre_optimizer_step(None, None, None, model=model)
    callback.on_train_end(None, None, None, model=model)
    return stream.getvalue()


@pytest.mark.parametrize("steps", [4, 12])
def test_a_layer_that_never_has_a_gradient_is_named_once(steps: int) -> None:
    said = told(["called", "read", "late"], steps)
    assert f"Warning: these adapted layers had no gradient in {min(steps, 10)} steps: read. If" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "run",
    [
        {"targets": ["called", "late"]},
        {"targets": ["called", "read"], "frozen": ("read",)},
        {"targets": ["called", "read"], "detach": True},
    ],
    ids=["a layer that runs in one step only", "frozen deltas", "gradients that are kept elsewhere"],
)
def test_there_is_no_false_alarm(run: dict[str, Any]) -> None:
    assert told(**run, steps=12) == ""

"""The rotation of the probes: one group of layers after the other, and what the optimizer keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.quality.rotation import InTurns, Rotation
from peft import PeftModel, get_peft_model
from torch import nn

import paca

LAYERS = ("0", "2")


def trained(rotation: Rotation) -> tuple[PeftModel, torch.optim.Optimizer, InTurns]:
    """A model of two layers after one step, and the callback that rotates one of them at a time."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = get_peft_model(base, paca.PacaConfig(r=8, paca_alpha=8, target_modules=list(LAYERS), random_seed=0))
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(deltas.values(), lr=0.1)
    names = {id(p): name.removeprefix("base_model.model.").rpartition(".paca_delta")[0] for name, p in deltas.items()}
    callback = InTurns(rotation, optimizer, names)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    return model, optimizer, callback


def columns(model: PeftModel) -> list[list[int]]:
    return list(paca.trained_columns(model).values())


def begin(callback: InTurns, step: int, model: PeftModel, optimizer: Any) -> None:
    callback.on_step_begin(None, SimpleNamespace(global_step=step), None, model=model, optimizer=optimizer)


def test_layers_rotate_one_group_after_the_other() -> None:
    model, optimizer, callback = trained(Rotation(every=8, groups=2))
    first = columns(model)
    begin(callback, 2, model, optimizer)
    assert columns(model) == first
    x = torch.randn(4, 64)
    before = model(x)
    begin(callback, 4, model, optimizer)
    second = columns(model)
    assert second[0] == first[0]
    assert not set(second[1]) & set(first[1])
    begin(callback, 8, model, optimizer)
    third = columns(model)
    assert third[1] == second[1]
    assert not set(third[0]) & set(first[0])
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("carry", [False, True])
def test_the_optimizer_forgets_or_carries_on_with_the_mean_of_each_row(carry: bool) -> None:
    model, optimizer, callback = trained(Rotation(every=8, groups=2, carry=carry))
    stays, turns = (group["params"][0] for group in optimizer.param_groups)
    squares = optimizer.state[turns]["exp_avg_sq"].clone()
    kept = optimizer.state[stays]["exp_avg"].clone()
    begin(callback, 4, model, optimizer)
    assert torch.equal(optimizer.state[stays]["exp_avg"], kept)
    assert (turns in optimizer.state) == carry
    if carry:
        state = optimizer.state[turns]
        assert not state["exp_avg"].any()
        torch.testing.assert_close(state["exp_avg_sq"], squares.mean(1, keepdim=True).expand(64, 8))
        assert state["step"] == 1


def test_the_rate_of_a_group_grows_again_after_its_turn() -> None:
    model, optimizer, callback = trained(Rotation(every=8, groups=2, rewarm=4))
    rates = []
    for step in range(4, 9):
        for group in optimizer.param_groups:
            group["lr"] = 0.1  # as the schedule does
        begin(callback, step, model, optimizer)
        callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
        rates.append([group["lr"] for group in optimizer.param_groups])
    turning = [0.025, 0.05, 0.075, 0.1, 0.1]
    assert [rate for _, rate in rates] == pytest.approx(turning)
    assert [rate for rate, _ in rates] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.025])

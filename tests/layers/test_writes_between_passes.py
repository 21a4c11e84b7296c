"""A delta written through `.data` between a forward and its backward pass, and a call that writes the weight after it.

No version counter shows such a write. A change of mode lets the next pass compare; the call must leave it something to
compare with, or the backward pass would take a gradient through columns that its forward pass never saw.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import paca
from paca.layers import paca_layers


def adapted() -> PeftModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    configs = [paca.PacaConfig(r=8, paca_alpha=8, target_modules=["0", "2"], random_seed=seed) for seed in (0, 1)]
    peft_model = get_peft_model(model, configs[0], adapter_name="A")
    peft_model.add_adapter("B", configs[1])
    peft_model.set_adapter("A")
    return peft_model


def write(model: PeftModel) -> None:
    for layer in paca_layers(model):
        layer.paca_delta["A"].data.add_(torch.randn_like(layer.paca_delta["A"]))


def disable(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def switch(model: PeftModel) -> None:
    model.base_model.set_adapter(["A", "B"])
    model.base_model.set_adapter("A")


def scale(model: PeftModel) -> None:
    for layer in paca_layers(model):
        layer.set_scale("A", 2.0)
        layer.set_scale("A", 1.0)


def move(model: PeftModel) -> None:
    model.to("cpu")


def save(model: PeftModel) -> None:
    model.state_dict()
    switch(model)


def load_other(model: PeftModel) -> None:
    other = {name: value.clone() for name, value in model.state_dict().items() if "delta.B" in name}
    model.load_state_dict(other, strict=False)


def loss_of(model: PeftModel) -> torch.Tensor:
    return model(torch.ones(3, 16, dtype=torch.float64)).square().sum()


def change_modes(model: PeftModel) -> None:
    model.eval()
    with torch.no_grad():
        loss_of(model)
    model.train()
    loss_of(model)


@pytest.mark.parametrize("call", [disable, switch, scale, move, save, load_other, paca.refresh])
def test_a_call_does_not_hide_a_write_from_a_pending_backward_pass(call: Callable[[PeftModel], None]) -> None:
    model = adapted()
    loss = loss_of(model)
    write(model)
    call(model)
    change_modes(model)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_a_refresh_finds_what_was_written_before_or_within_a_disabled_stretch() -> None:
    for within in (False, True):
        model = adapted()
        loss = loss_of(model)
        if not within:
            write(model)
        with model.disable_adapter():
            if within:
                write(model)
        paca.refresh(model)
        with pytest.raises(RuntimeError, match="between forward and backward"):
            loss.backward()


@pytest.mark.parametrize("call", [disable, switch, scale, move, save, load_other, paca.refresh])
def test_without_a_write_the_pending_backward_pass_has_its_gradient(call: Callable[[PeftModel], None]) -> None:
    model = adapted()
    deltas = [layer.paca_delta["A"] for layer in paca_layers(model)]
    expected = torch.autograd.grad(loss_of(model), deltas)
    loss = loss_of(model)
    call(model)
    change_modes(model)
    for delta in deltas:
        delta.requires_grad_(True)
    loss.backward()
    for delta, gradient in zip(deltas, expected, strict=True):
        assert delta.grad is not None
        torch.testing.assert_close(delta.grad, gradient)

"""A delta written through `.data` between a forward and its backward pass, and a call that writes the weight after it.

No version counter shows such a write. A change of mode lets the next pass compare; the call must leave it something to
compare with, or the backward pass would take a gradient through columns that its forward pass never saw.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_step_of_one_adapter_hides_no_write_to_another(stepped: bool, parked: bool) -> None:
    model = adapted()
    deltas = [layer.paca_delta["B"] for layer in paca_layers(model)]
    optimizer = torch.optim.AdamW([layer.paca_delta["A"] for layer in paca_layers(model)])
    model.base_model.set_adapter("B")
    pending = loss_of(model)
    model.base_model.set_adapter(["A", "B"])
    loss_of(model).backward()
    for delta in deltas:
        delta.data.add_(1.0)  # by an optimizer that is no `torch.optim.Optimizer`
    if parked:
        model.state_dict()
    if stepped:
        optimizer.step()
    else:
        loss_of(model)
    model.base_model.set_adapter("B")
    with pytest.raises(RuntimeError, match="between forward and backward"):
        torch.autograd.grad(pending, deltas)


class Learner(nn.Module):
    """A model that runs a part of itself with other deltas, as meta-learning does, or at another scale."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.fast: dict[str, torch.Tensor] | None = None
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in paca_layers(self.net):
            layer.scaling["default"] = self.scale
        return self.net(x) if self.fast is None else torch.func.functional_call(self.net, self.fast, (x,))


def learner() -> PeftModel:
    torch.manual_seed(0)
    config = paca.PacaConfig(r=4, paca_alpha=4, target_modules=["0", "2"], init_weights=False)
    return get_peft_model(Learner(), config)


@pytest.mark.parametrize("how", ["in place", "other memory", "load_state_dict"])
def test_a_write_between_two_mixed_batches_ends_no_loss_of_the_second(how: str) -> None:
    """It was refused, as though the write had come after its forward pass."""
    model, names = adapted().eval(), ["A", "B", "__base__"]
    deltas = [layer.paca_delta["B"] for layer in paca_layers(model)]
    for delta in deltas:
        delta.requires_grad_(True)
    x = torch.ones(3, 16, dtype=torch.float64)
    model(x, adapter_names=names).square().sum().backward()
    for delta in deltas:
        delta.grad = None
        if how == "other memory":
            delta.data = delta.data + 1
        elif how == "in place":
            with torch.no_grad():
                delta.add_(1)
    if how == "load_state_dict":
        state = {name: value + 1 for name, value in model.state_dict().items() if "delta.B" in name}
        model.load_state_dict(state, strict=False)
    model(x, adapter_names=names).square().sum().backward()
    found = [delta.grad.clone() for delta in deltas if delta.grad is not None]
    model.base_model.set_adapter("B")
    model.zero_grad()
    model(x[:1]).square().sum().backward()
    torch.testing.assert_close(found, [delta.grad for delta in deltas])


def test_memory_that_is_replaced_twice_between_two_passes_counts() -> None:
    """The second may get the address of the first, which the weights still hold."""
    model = adapted()
    with torch.no_grad():
        for _ in range(20):
            loss_of(model)
            deltas = [layer.paca_delta["A"] for layer in paca_layers(model)]
            for delta in deltas:
                delta.data = torch.zeros_like(delta)
            for delta in deltas:
                delta.data = delta.data + torch.randn_like(delta)
            found = loss_of(model)
            paca.refresh(model)
            assert torch.equal(found, loss_of(model))


def test_deltas_that_the_model_itself_replaces_count_and_get_their_gradients() -> None:
    model = learner()
    inner = model.base_model.model
    plain = loss_of(model).detach()
    inner.fast = {
        name: torch.randn_like(delta).requires_grad_()
        for name, delta in inner.net.named_parameters()
        if "delta" in name
    }
    loss = loss_of(model)
    loss.backward()
    found = {name: delta.grad for name, delta in inner.fast.items()}
    assert all(delta.grad is None for delta in inner.net.parameters())
    fast, inner.fast = inner.fast, None
    assert torch.equal(loss_of(model), plain)
    with torch.no_grad():
        for name, delta in inner.net.named_parameters():
            if name in fast:
                delta.copy_(fast[name])
    own = loss_of(model)
    own.backward()
    torch.testing.assert_close(own, loss)
    for name, delta in inner.net.named_parameters():
        if name in fast:
            torch.testing.assert_close(found[name], delta.grad)


def test_a_scale_that_the_model_itself_sets_counts() -> None:
    model = learner()
    plain = loss_of(model).detach()
    model.base_model.model.scale = 3.0
    scaled = loss_of(model)
    assert (scaled - plain).abs() > 1e-3
    paca.refresh(model)
    assert torch.equal(loss_of(model), scaled)


def test_a_part_that_is_called_by_itself_finds_a_write_in_another_mode() -> None:
    model, x = adapted(), torch.randn(3, 16, dtype=torch.float64)
    optimizer = torch.optim.AdamW([layer.paca_delta["A"] for layer in paca_layers(model)])
    loss_of(model).backward()
    optimizer.step()
    loss_of(model)
    write(model)
    model.eval()
    part = model.base_model.model[0]  # as `generate` calls an encoder
    with torch.no_grad():
        found = part(x)
        paca.refresh(model)
        assert torch.equal(found, part(x))


def test_each_new_thread_finds_a_write() -> None:
    model = adapted().eval()

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return loss_of(model)

    for _ in range(3):  # a thread gets the number of one that has ended
        with ThreadPoolExecutor(1) as pool:
            pool.submit(infer).result()
        write(model)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(infer).result()
        paca.refresh(model)
        assert torch.equal(found, infer())

"""`paca.FactoredAdamW`: what it computes is LoRA's step on two factors of the columns."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

import paca


def adapted(*, bias: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6))
    if bias:
        settings["modules_to_save"] = ["2"]
    targets = ["0"] if bias else ["0", "2"]
    return peft.get_peft_model(model, paca.PacaConfig(r=8, paca_alpha=8, target_modules=targets, **settings))


def deltas(model: Any) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "paca_delta" in name]


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        x, y = torch.randn(16, 12, generator=generator), torch.randn(16, 6, generator=generator)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_delta_is_what_adamw_on_loras_factors_makes_of_it() -> None:
    model, rate, scale = adapted(), 0.01, 2.0
    layers = [module for module in model.modules() if hasattr(module, "paca_delta")]
    base = [copy.deepcopy(layer.get_base_layer()).requires_grad_(False) for layer in layers]
    places = [layer.paca_indices["default"] for layer in layers]
    factors = []
    for number, delta in enumerate(deltas(model), 1):
        drawn = torch.Generator().manual_seed(number)
        a = torch.empty(3, 8).uniform_(-(8**-0.5), 8**-0.5, generator=drawn)
        factors += [nn.Parameter(a), nn.Parameter(torch.zeros(delta.shape[0], 3))]

    def lora(x: torch.Tensor) -> torch.Tensor:
        for at in range(2):
            a, b = factors[2 * at : 2 * at + 2]
            x = base[at](x) + scale * x[:, places[at]] @ a.T @ b.T
            x = x.tanh() if at == 0 else x
        return x

    reference = torch.optim.AdamW(factors, lr=rate, weight_decay=0.1)
    optimizer = paca.FactoredAdamW(trained(model), lr=rate, rank=3, scale=scale, weight_decay=0.1)
    assert steps(model, optimizer, 10) == pytest.approx(steps(lora, reference, 10), rel=1e-5)
    for at, delta in enumerate(deltas(model)):
        torch.testing.assert_close(delta.detach(), scale * (factors[2 * at + 1] @ factors[2 * at]).detach())
        assert torch.linalg.matrix_rank(delta.detach()) == 3


@pytest.mark.parametrize("fast", [True, False])
def test_factors_of_bfloat16_weights_have_the_gradients_of_their_delta(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    model = adapted().to(torch.bfloat16)
    model = peft.get_peft_model(model.unload(), paca.PacaConfig(r=8, paca_alpha=8, target_modules=["0"]))
    (delta,) = deltas(model)
    assert delta.dtype == torch.float32
    optimizer = paca.FactoredAdamW([delta], lr=0.01, rank=3, scale=2.0, betas=(0.0, 0.999))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # at the first step B is zero, and so is A's gradient
        delta.grad = torch.randn(delta.shape, generator=generator)
        state = optimizer.state[delta]
        before = {name: state[name].clone() for name in "ab" if name in state}
        optimizer.step()
    expected = {"a": 2 * before["b"].mT @ delta.grad, "b": 2 * delta.grad @ before["a"].mT}
    for name, value in expected.items():
        found = state[f"{name}_mean"]  # with a first beta of 0, the gradient
        assert found.dtype == torch.float32
        error = (found - value).norm() / value.norm()
        assert (1e-4 < error < 2**-7) if fast else error < 1e-6


def test_what_is_no_delta_is_stepped_by_adamw() -> None:
    one, other = adapted(bias=True), adapted(bias=True)
    steps(one, paca.FactoredAdamW(trained(one), lr=0.01, rank=2), 1)
    steps(other, torch.optim.AdamW(trained(other), lr=0.01, weight_decay=0.0), 1)
    saved = [[p for name, p in model.named_parameters() if "modules_to_save" in name] for model in (one, other)]
    assert saved[0]
    for ours, theirs in zip(*saved, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_as_if_nothing_had_been(dtype: torch.dtype) -> None:
    model = adapted()
    for delta in deltas(model):
        delta.data = delta.data.to(dtype)
    optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=4)
    steps(model, optimizer, 5)
    again = copy.deepcopy(model)
    reloaded = paca.FactoredAdamW(trained(again), lr=0.5, rank=1)
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {value.dtype for value in reloaded.state[deltas(again)[0]].values() if torch.is_tensor(value)} == {
        torch.float32
    }
    assert steps(again, reloaded, 5, seed=2) == steps(model, optimizer, 5, seed=2)
    assert all(torch.equal(*pair) for pair in zip(deltas(model), deltas(again), strict=True))


def test_an_adapter_that_was_trained_before_is_where_it_starts() -> None:
    model = adapted()
    steps(model, torch.optim.AdamW(trained(model), lr=0.01), 3)
    before = [delta.detach().clone() for delta in deltas(model)]
    steps(model, paca.FactoredAdamW(trained(model), lr=0.01, rank=2), 3)
    for start, delta in zip(before, deltas(model), strict=True):
        assert torch.linalg.matrix_rank(delta.detach() - start, atol=1e-6) == 2


def test_a_layer_that_was_never_used_has_no_state_after_loading() -> None:
    model = adapted()
    first, _ = deltas(model)
    optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2)
    first.grad = torch.ones_like(first)
    optimizer.step()
    for _ in range(2):  # also from what was loaded
        state = optimizer.state_dict()
        optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2)
        optimizer.load_state_dict(state)
    assert list(optimizer.state) == [first]


def test_a_small_change_between_steps_stays() -> None:
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), lr=0.0, rank=2)
    steps(model, optimizer, 1)
    with torch.no_grad():
        changed = [delta.add_(1e-3).clone() for delta in deltas(model)]
    steps(model, optimizer, 2)
    for delta, value in zip(deltas(model), changed, strict=True):
        torch.testing.assert_close(delta.detach(), value)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_delta_that_was_written_between_steps_is_where_it_goes_on(value: float) -> None:
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2)
    steps(model, optimizer, 5)
    saved = {name: torch.full_like(x, value) for name, x in model.state_dict().items() if "paca_delta" in name}
    model.load_state_dict(saved, strict=False)
    steps(model, optimizer, 1)
    for delta in deltas(model):
        assert (delta.detach() - value).abs().max() < 0.05


def test_factors_of_another_adapter_do_not_write_over_this_one() -> None:
    model, other = adapted(), adapted()
    optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2)
    steps(model, optimizer, 20)
    steps(other, torch.optim.AdamW(trained(other), lr=0.02), 20, seed=3)
    before = [delta.detach().clone() for delta in deltas(other)]
    loaded = paca.FactoredAdamW(trained(other), lr=0.0, rank=2)
    loaded.load_state_dict(optimizer.state_dict() | {"param_groups": loaded.state_dict()["param_groups"]})
    steps(other, loaded, 1)
    for start, delta in zip(before, deltas(other), strict=True):
        torch.testing.assert_close(delta.detach(), start)


def test_a_step_under_autocast_is_the_step_without() -> None:
    one, other = adapted(), adapted()
    first, second = (paca.FactoredAdamW(trained(model), lr=0.01, rank=2) for model in (one, other))
    for model in (one, other):
        model(torch.ones(4, 12)).square().mean().backward()
    first.step()
    with torch.autocast("cpu", torch.bfloat16):
        second.step()
    assert all(torch.equal(*pair) for pair in zip(deltas(one), deltas(other), strict=True))


def test_the_draws_differ_by_seed_and_by_layer() -> None:
    drawn = []
    for seed in (0, 1):
        model = adapted()
        optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2, seed=seed)
        steps(model, optimizer, 1)
        drawn += [optimizer.state[delta]["a"] for delta in deltas(model)]
    assert not any(torch.equal(a, b) for at, a in enumerate(drawn) for b in drawn[:at])


def test_what_holds_no_delta_and_the_state_of_another_optimizer_are_refused() -> None:
    model = adapted()
    copies = [delta.detach().clone().requires_grad_() for delta in deltas(model)]
    optimizer = paca.FactoredAdamW(copies)
    with pytest.raises(ValueError, match="holds no delta of PaCA"):
        optimizer.step()
    adamw = torch.optim.AdamW(trained(model), lr=0.01)
    steps(model, adamw, 1)
    with pytest.raises(ValueError, match="another optimizer's"):
        paca.FactoredAdamW(trained(model)).load_state_dict(adamw.state_dict())


def test_rotation_starts_new_factors() -> None:
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), lr=0.01, rank=2)
    steps(model, optimizer, 3)
    x = torch.randn(4, 12)
    before = model(x)
    paca.rotate(model, optimizer, 1)
    assert torch.equal(model(x), before)
    assert all(not delta.any() or torch.linalg.matrix_rank(delta.detach()) <= 2 for delta in deltas(model))
    losses = steps(model, optimizer, 20)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert all(optimizer.state[delta]["step"] == 20 for delta in deltas(model))


class Experts(nn.Module):
    """Two experts as one parameter, as transformers' mixtures have them."""

    def __init__(self) -> None:
        super().__init__()
        self.is_transposed = False
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.nn.functional.linear(x, self.gate_up_proj[number]) for number in range(2))  # type: ignore


@pytest.mark.parametrize(
    ("layer", "inputs", "rows", "columns"),
    [
        (nn.Conv2d(12, 6, 3), (2, 12, 5, 5), (6,), 8 * 9),
        (nn.Conv1d(12, 6, 3), (2, 12, 5), (6,), 8 * 3),
        (Experts(), (16, 12), (2, 6), 8),
    ],
)
def test_other_layers_have_factors_of_their_matrices(
    layer: nn.Module, inputs: tuple[int, ...], rows: tuple[int, ...], columns: int
) -> None:
    model = nn.Sequential(layer)
    target: dict[str, Any] = {"target_modules": ["0"]}
    if isinstance(layer, Experts):
        target = {"target_modules": [], "target_parameters": ["0.gate_up_proj"]}
    adapter: Any = peft.get_peft_model(model, paca.PacaConfig(r=8, paca_alpha=8, **target))
    optimizer = paca.FactoredAdamW(trained(adapter), lr=0.01, rank=2)
    losses = []
    for _ in range(10):
        loss = (adapter(torch.ones(inputs)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    [delta] = deltas(adapter)
    state = optimizer.state[delta]
    assert state["b"].shape == (*rows, 2)
    assert state["a"].shape == (*rows[:-1], 2, columns)
    assert torch.equal(torch.linalg.matrix_rank(delta.detach().reshape(*rows, columns)), torch.full(rows[:-1], 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of 1 or more, not 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"lr": -1.0}, "lr must be zero or more, not -1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers of zero or more and less than 1"),
    ],
)
def test_numbers_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paca.FactoredAdamW(trained(adapted()), **settings)


def test_another_default_device_changes_nothing():
    def after(device: str) -> list[nn.Parameter]:
        model = adapted()
        optimizer = paca.FactoredAdamW(trained(model), lr=1e-2, rank=4)
        model(torch.ones(2, 12)).square().sum().backward()
        with torch.device(device):
            optimizer.step()
        return deltas(model)

    assert all(map(torch.equal, after("meta"), after("cpu")))

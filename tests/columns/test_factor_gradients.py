"""What `paca.FactoredAdamW` has of its deltas: gradients of their factors, which backward passes make straight away."""

from __future__ import annotations

import gc
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paca
from factored_deltas import adapted, after_a_step, batch, of_the_factors, trained, twice


def of_the_delta(model: Any, optimizer: Any, backward: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors' gradients, as they follow from the delta's own."""
    factors = {p: [optimizer.state[p][name].clone() for name in "ab"] for p in trained(model)}
    with torch.no_grad():
        other = adapted()
        for mine, its in zip(trained(model), trained(other), strict=True):
            its.copy_(mine)
    backward(other)
    found = []
    for mine, its in zip(trained(model), trained(other), strict=True):
        (a, b), gradient = factors[mine], its.grad
        assert gradient is not None
        assert type(gradient) is torch.Tensor
        found.append((2.0 * b.T @ gradient, 2.0 * gradient @ a.T))
    return found


def shared(model: Any) -> None:
    (model(batch(2)) * model(batch(3))).sum().backward()


def recomputed(model: Any, *, use_reentrant: bool) -> None:
    x = batch(2).requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()


@pytest.mark.parametrize(
    "backward",
    [
        twice,
        shared,
        lambda model: recomputed(model, use_reentrant=False),
        lambda model: recomputed(model, use_reentrant=True),
    ],
    ids=["accumulated", "called twice", "checkpointed", "checkpointed, reentrant"],
)
def test_gradients_of_factors_are_those_that_follow_from_the_deltas(backward: Any) -> None:
    model, optimizer = after_a_step()
    expected = of_the_delta(model, optimizer, backward)
    backward(model)
    for mine, its in zip(of_the_factors(model), expected, strict=True):
        torch.testing.assert_close(mine, its)
        assert all(gradient.abs().max() > 0 for gradient in mine)


def test_nothing_as_large_as_a_delta_is_made_in_a_backward_pass() -> None:
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            made_here.extend([made] if isinstance(made, torch.Tensor) else [])
            return made

    made_here: list[torch.Tensor] = []
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)), paca.PacaConfig(r=64, paca_alpha=64, target_modules=["0"])
    )
    optimizer = paca.FactoredAdamW(trained(model), rank=2)
    loss = model(torch.ones(2, 64)).sum()
    with Sizes():
        loss.backward()
    assert optimizer
    assert made_here
    assert max(made.numel() for made in made_here if type(made) is torch.Tensor) <= 2 * 64


def test_they_are_clipped_as_loras_are() -> None:
    model, _ = after_a_step()
    twice(model)
    before = [part.clone() for pair in of_the_factors(model) for part in pair]
    norm = torch.linalg.vector_norm(torch.cat([part.flatten() for part in before]))
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(trained(model), 0.5), norm)
    after = [part for pair in of_the_factors(model) for part in pair]
    torch.testing.assert_close(after, [part * 0.5 / (norm + 1e-6) for part in before])
    for foreach in (True, None):
        found = torch.nn.utils.clip_grad_norm_(trained(model), 0.1, foreach=foreach)
        assert found == pytest.approx(0.5 if foreach else 0.1, rel=1e-4)


def test_scaled_losses_are_taken_back_and_steps_with_infinite_gradients_left_out() -> None:
    model, optimizer = after_a_step()
    twice(model)
    expected = [part.clone() for pair in of_the_factors(model) for part in pair]
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in (2, 3):
        scaler.scale(model(batch(seed)).square().sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close([part for pair in of_the_factors(model) for part in pair], expected)
    of_the_factors(model)[0][0].fill_(torch.inf)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = [p.detach().clone() for p in trained(model)]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(map(torch.equal, before, trained(model)))


def test_gradients_of_zero_are_zero() -> None:
    model, optimizer = after_a_step()
    twice(model)
    optimizer.zero_grad(set_to_none=False)
    assert not any(part.any() for pair in of_the_factors(model) for part in pair)
    twice(model)
    assert all(part.any() for pair in of_the_factors(model) for part in pair)


def test_what_asks_for_the_deltas_own_gradient_is_told_why_there_is_none() -> None:
    model, optimizer = after_a_step()
    twice(model)
    other = torch.optim.AdamW(trained(model))
    with pytest.raises(RuntimeError, match=r"only those of its two factors.*after that one is gone"):
        other.step()
    with pytest.raises(RuntimeError, match="only those of its two factors"):
        trained(model)[0].grad.isnan()  # type: ignore[union-attr]
    model.zero_grad()
    del optimizer
    gc.collect()
    twice(model)
    assert {type(p.grad) for p in trained(model)} == {torch.Tensor}
    other.step()


def test_a_loaded_optimizer_has_them_from_its_first_backward_pass() -> None:
    model, optimizer = after_a_step()
    again = adapted()
    with torch.no_grad():
        for mine, its in zip(trained(model), trained(again), strict=True):
            its.copy_(mine)
    loaded = paca.FactoredAdamW(trained(again), rank=1, scale=7.0)
    loaded.load_state_dict(optimizer.state_dict())
    twice(model)
    twice(again)
    assert all(map(torch.equal, *([part for pair in of_the_factors(m) for part in pair] for m in (model, again))))


def test_second_derivatives_are_refused_as_of_other_deltas() -> None:
    model, _ = after_a_step()
    x = batch(2).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives"):
        gradient.square().sum().backward()


def test_columns_without_gradients_begin_no_factors() -> None:
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), rank=2)
    with torch.no_grad():
        model(batch())
    assert not optimizer.state

"""Gradients of factors beside what else there is: other optimizers and gradients, copies, hooks, casts."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import paca
from factored_deltas import adapted, after_a_step, batch, of_the_factors, trained, twice


def test_a_second_optimizer_of_the_same_deltas_changes_no_step_of_the_first() -> None:
    (alone, optimizer), (model, first) = after_a_step(), after_a_step()
    twice(model)
    second = paca.FactoredAdamW(trained(model), rank=3, seed=5)
    with pytest.raises(RuntimeError, match=r"another paca.FactoredAdamW's.*zero_grad"):
        second.step()
    model.zero_grad()
    for one, its in ((alone, optimizer), (model, first)):
        twice(one)
        its.step()
    torch.testing.assert_close(trained(model), trained(alone))
    model.zero_grad()
    del first, its
    gc.collect()
    twice(model)
    assert len(of_the_factors(model)) == 2
    second.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("steps", [0, 1])
def test_copies_go_on_as_what_they_are_of(copied: Any, steps: int) -> None:
    model = adapted()
    both = model, paca.FactoredAdamW(trained(model), lr=0.1, rank=3, seed=7)
    for one, optimizer in [both] * steps + [copied(both), both]:
        optimizer.zero_grad()
        twice(one)
        optimizer.step()
    again, other = copied(both)
    for one, optimizer in (both, (again, other)):
        optimizer.zero_grad()
        twice(one)
        assert len(of_the_factors(one)) == 2
        optimizer.step()
    assert all(map(torch.equal, trained(model), trained(again)))


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        for delta in trained(model):
            delta.add_(1.0)


def write_through_data(model: Any) -> None:
    for delta in trained(model):
        delta.data.add_(1.0)
    paca.refresh(model)


def give_other_memory(model: Any) -> None:
    vector_to_parameters(parameters_to_vector(trained(model)) + 1, trained(model))


def check_that_a_step_keeps_values(model: Any, optimizer: Any) -> None:
    want = [delta.detach().clone() for delta in trained(model)]
    optimizer.param_groups[0]["lr"] = 0.0
    twice(model)
    optimizer.step()
    torch.testing.assert_close([delta.detach() for delta in trained(model)], want)


@pytest.mark.parametrize("write", [write_in_place, write_through_data, give_other_memory])
def test_a_delta_that_was_written_keeps_its_values_in_the_next_step(write: Any) -> None:
    model, optimizer = after_a_step()
    write(model)
    model(batch())
    check_that_a_step_keeps_values(model, optimizer)


def test_so_does_a_copy_of_one_that_was_written() -> None:
    """It counts its versions anew."""
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), rank=3)
    optimizer.begin()
    write_in_place(model)
    check_that_a_step_keeps_values(*copy.deepcopy((model, optimizer)))


def test_a_loaded_state_takes_gradients_that_are_there() -> None:
    (alone, expected), (model, optimizer) = after_a_step(), after_a_step()
    for one in (alone, model):
        twice(one)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    expected.step()
    assert all(map(torch.equal, trained(model), trained(alone)))


@pytest.mark.parametrize("order", ["before", "after", "beside"])
def test_they_add_up_with_gradients_of_the_delta_itself(order: str) -> None:
    """As compiled layers make them, and passes from before there was an optimizer of factors."""
    (alone, expected), (model, optimizer) = after_a_step(), after_a_step()
    other = adapted()
    with torch.no_grad():
        for one, its in zip(trained(model), trained(other), strict=True):
            its.copy_(one)
    other(batch(4)).square().sum().backward()
    alone(batch(4)).square().sum().backward()
    twice(alone)
    expected.step()
    own: list[Any] = [p.grad for p in trained(other)]
    mine: list[Any] = trained(model)
    if order == "before":
        for p, gradient in zip(mine, own, strict=True):
            p.grad = gradient
    twice(model)
    for p, gradient in zip(mine, own, strict=True):
        if order == "after":
            p.grad += gradient
        elif order == "beside":
            p.grad = gradient + p.grad
    optimizer.step()
    torch.testing.assert_close(trained(model), trained(alone))


def test_what_looks_at_gradients_in_backward_passes_sees_the_deltas() -> None:
    (alone, expected), (model, optimizer) = after_a_step(), after_a_step()
    seen: list[torch.Tensor] = []
    hooks = [p.register_hook(seen.append) for p in trained(model)]
    for anomaly in (False, True):
        twice(alone)
        with torch.autograd.set_detect_anomaly(anomaly):
            twice(model)
        for its in (optimizer, expected):
            its.step()
            its.zero_grad()
        for hook in hooks:
            hook.remove()
    assert [type(gradient) for gradient in seen] == [torch.Tensor] * 4
    torch.testing.assert_close(trained(model), trained(alone))


def test_values_are_clipped_and_gradients_follow_a_model_that_is_cast() -> None:
    for foreach in (None, True):
        model, _ = after_a_step()
        twice(model)
        expected = [part.clamp(-0.1, 0.1) for pair in of_the_factors(model) for part in pair]
        torch.nn.utils.clip_grad_value_(trained(model), 0.1, foreach=foreach)
        assert all(map(torch.equal, [part for pair in of_the_factors(model) for part in pair], expected))
    model.float().share_memory()
    assert [p.grad.dtype for p in trained(model) if p.grad is not None] == [torch.float32] * 2


def test_deltas_of_any_strides_have_them() -> None:
    model = adapted()
    for p in trained(model):
        p.data = p.data.t().contiguous().t()
    optimizer = paca.FactoredAdamW(trained(model), lr=0.1, rank=3)
    twice(model)
    optimizer.step()
    assert len(of_the_factors(model)) == 2


def test_a_group_whose_parameters_were_replaced_is_stepped_with_its_own() -> None:
    model = adapted()
    optimizer = paca.FactoredAdamW(trained(model), rank=3)
    optimizer.param_groups[0]["params"] = trained(model)[1:]
    for p in trained(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not trained(model)[0].any()
    assert trained(model)[1].any()


def test_gradients_that_are_there_keep_no_model() -> None:
    model, optimizer = after_a_step()
    twice(model)
    kept = [weakref.ref(tensor) for p in trained(model) for tensor in (p, optimizer.state[p]["a"])]
    del model, optimizer
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)


@pytest.mark.parametrize(
    "asked",
    [
        lambda gradient: gradient.data_ptr(),
        lambda gradient: gradient.norm(dim=0),
        lambda gradient: gradient.norm(p=0),
        lambda gradient: gradient * gradient,
        lambda gradient: gradient + 1.0,
        lambda gradient: gradient.add_(torch.ones(())),
    ],
)
def test_what_factors_do_not_tell_is_refused(asked: Any) -> None:
    model, _ = after_a_step()
    twice(model)
    with pytest.raises(RuntimeError, match="only those of its two factors"):
        asked(trained(model)[0].grad)

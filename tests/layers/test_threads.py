"""Threads: inference in many, at once, also while another one trains (docs/reliability.md, "Threads and processes").

Where it matters when something happens, a product is torn by hand: half of its rows, then what another thread does
meanwhile, then the other half. The long form, with real races, is `python -m distributed.threads`.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paca
from distributed.threads import Counting, outputs_at_once
from models import adapted_perceptron, perceptron
from paca.columns.resident import WRITING
from paca.functional.linear import LinearProduct
from paca.layers import paca_layers, resident_weight


def in_a_thread(action):
    trouble = []

    def run():
        try:
            action()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert trouble == []


def tear(monkeypatch, meanwhile, whole=0):
    """Let the next linear product, after so many `whole` ones, be half done when another thread does `meanwhile`."""
    linear, todo = F.linear, [None] * whole + [meanwhile]

    def torn(x, weight, bias=None):
        action = todo.pop(0) if todo else None
        if action is None:
            return linear(x, weight, bias)
        half = weight.shape[0] // 2
        first = linear(x, weight[:half])
        in_a_thread(action)
        return torch.cat([first, linear(x, weight[half:])], -1) + bias

    monkeypatch.setattr(F, "linear", torn)
    return todo


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("what", ["a step", "a switch", "disabling", "a scale"])
def test_a_pass_during_which_another_thread_writes_sees_no_mixture(monkeypatch, what, gradients):
    training = Counting()
    model = training.model
    x = torch.ones(2, 16, dtype=torch.float64)
    actions = {
        "a step": training.step,
        "a switch": lambda: model.set_adapter("other"),
        "disabling": model.base_model.disable_adapter_layers,
        "a scale": lambda: [layer.set_scale("default", 3.0) for layer in paca_layers(model)],
    }
    training.step()
    with torch.set_grad_enabled(gradients):
        before = model(x).detach()
        todo = tear(monkeypatch, actions[what])
        y = model(x).detach()
        assert not todo
        after = model(x).detach()
    assert not torch.equal(before, after)
    assert torch.equal(y, before) or torch.equal(y, after)


def test_a_pass_that_began_in_the_middle_of_a_write_sees_no_mixture(monkeypatch):
    """The writer stops when half of the columns are in, until the reader comes to the lock that the writer holds."""
    training = Counting()
    model, x = training.model, torch.ones(2, 16, dtype=torch.float64)
    training.step()
    half_written, go_on = threading.Event(), threading.Event()
    copy, linear = torch._foreach_copy_, F.linear

    def in_halves(targets, sources):
        for target, source in zip(targets, sources, strict=True):
            half = len(target) // 2
            target[:half].copy_(source[:half])
            half_written.set()
            assert go_on.wait(10)
        copy(targets, sources)

    @torch.no_grad()
    def write():
        training.write_by_hand()
        model(x)

    def multiply(x, weight, bias=None):
        if writer.ident is None:  # the reader's first product: it has looked what the weight holds
            writer.start()
            assert half_written.wait(10)
        return linear(x, weight, bias)

    class Watched:
        def __enter__(self):
            go_on.set()
            WRITING.__enter__()

        def __exit__(self, *raised):
            WRITING.__exit__(*raised)

    writer = threading.Thread(target=write)
    with torch.no_grad():
        before = model(x)
        monkeypatch.setattr(torch, "_foreach_copy_", in_halves)
        monkeypatch.setattr(F, "linear", multiply)
        monkeypatch.setattr(resident_weight, "WRITING", Watched())
        seen = model(x)
        go_on.set()
        writer.join(10)
        monkeypatch.undo()
        after = model(x)
    assert half_written.is_set()
    assert not torch.equal(before, after)
    for of_layer, old, new in zip(seen, before, after, strict=True):
        assert torch.equal(of_layer, old) or torch.equal(of_layer, new)


def test_a_step_waits_for_a_write_that_another_thread_has_begun():
    """Else the write might read deltas that are half of before and half of after the step."""
    training = Counting()
    model, x = training.model, torch.ones(2, 16, dtype=torch.float64)
    training.step()
    layer, order = paca_layers(model)[0], []

    def step():
        training.optimizer.step()
        order.append("step")

    thread = threading.Thread(target=step)
    (-model(x)).sum().backward()

    class Watched(dict):
        def __getitem__(self, name):  # read in the middle of a write, which asks what is wanted
            if not order:
                thread.start()
                thread.join(0.2)
                order.append("write")
            return super().__getitem__(name)

    with torch.no_grad():
        training.write_by_hand()
        layer.scaling = Watched(layer.scaling)
        model(x)
    thread.join(10)
    assert order == ["write", "step"]


@pytest.mark.parametrize("stale", ["written in place", "parked", "written through .data"])
def test_threads_that_start_with_stale_columns_give_what_one_after_the_other_gives(stale):
    def build():
        model = adapted_perceptron(dtype=torch.float64).eval()
        with torch.no_grad():
            model(torch.zeros(1, 7, dtype=torch.float64))
        if stale == "parked":
            model.kept = model.state_dict()
        else:
            for layer in paca_layers(model):
                delta = layer.paca_delta["default"]
                with torch.no_grad():
                    (delta if stale == "written in place" else delta.data).mul_(2)
        return model

    xs = torch.randn(8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alone = build()
    paca.refresh(alone)  # by itself each new thread compares, since it has not run the model before
    with torch.no_grad():
        want = [alone(x) for x in xs]
    for _ in range(5):
        got = outputs_at_once(build(), list(xs))
        assert all(map(torch.equal, got, want))


def test_disabling_holds_for_all_threads_and_ends_for_all_with_the_first_to_leave():
    """As PEFT has it; docs/method.md says so."""
    model, base = adapted_perceptron(dtype=torch.float64).eval(), perceptron(dtype=torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        adapted = model(x)
        first, second = model.disable_adapter(), model.disable_adapter()
        in_a_thread(first.__enter__)
        assert torch.equal(model(x), base(x))
        second.__enter__()
        in_a_thread(lambda: first.__exit__(None, None, None))
        assert torch.equal(model(x), adapted)
        second.__exit__(None, None, None)
        assert torch.equal(model(x), adapted)


def test_a_mixed_batch_and_a_pass_beside_it_wait_for_the_step_of_a_third_thread():
    training = Counting()
    model, x = training.model.eval(), torch.ones(2, 16, dtype=torch.float64)
    names = ["other", "__base__"]
    with torch.no_grad():
        mixed, before = model(x, adapter_names=names), model(x)
    (-model(x)).sum().backward()
    in_the_step, seen = threading.Event(), []

    def infer():
        assert in_the_step.wait(10)
        with torch.no_grad():
            seen.append(model(x, adapter_names=names))

    def underway(optimizer, args, kwargs):
        in_the_step.set()
        thread.join(0.2)
        assert not seen

    thread = threading.Thread(target=infer)
    thread.start()
    training.optimizer.register_step_pre_hook(underway)
    training.optimizer.step()
    thread.join(10)
    assert torch.equal(seen[0], mixed)
    with torch.no_grad():
        assert torch.equal(model(x), before + 16)


class Halves(torch.optim.Optimizer):
    """A step of two operations, as AdamW's decay and update, which stops between them."""

    def __init__(self, parameters, wait=0.2):
        super().__init__(parameters, {})
        self.within, self.go_on, self.wait = threading.Event(), threading.Event(), wait

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)
                self.within.set()
                self.go_on.wait(self.wait)
                parameter.add_(1.0)


@pytest.mark.parametrize(
    "park", [lambda model, x: model.state_dict(), lambda model, x: model(x, adapter_names=["other"])]
)
def test_a_step_of_another_model_leaves_parked_columns_to_be_written(park):
    model, x = (training := Counting()).model.eval(), training.x
    training.step()
    other = Halves([nn.Parameter(torch.ones(2))], wait=10)
    with torch.no_grad():
        want = model(x)
        park(model, x)
        thread = threading.Thread(target=other.step)
        thread.start()
        other.within.wait(10)
        found = model(x)
        other.go_on.set()
        thread.join(10)
    assert want.any()
    assert torch.equal(found, want)


@pytest.mark.parametrize("names", [{}, {"adapter_names": ["default"]}])
def test_a_pass_on_parked_columns_waits_for_the_step_of_its_deltas(names):
    """Half of a step is neither before nor after it, and without its columns the model is the pretrained one."""
    model, x = (training := Counting()).model.eval(), training.x
    with torch.no_grad():
        for delta in training.deltas:
            delta.fill_(4.0)
    (-model(x)).sum().backward()
    optimizer = Halves(training.deltas)
    with torch.no_grad():
        model(x, adapter_names=["default"])  # parks
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        optimizer.within.wait(10)
        found = model(x, **names)
        thread.join(10)
        assert torch.equal(found, model(x))
        assert found.eq(8 * 3.0).all()


@pytest.mark.parametrize("meanwhile", ["nothing", "a mixed batch", "a mixed batch and a pass"])
def test_a_backward_pass_within_which_a_mixed_batch_runs_raises_or_is_right(monkeypatch, meanwhile):
    model = adapted_perceptron(dtype=torch.float64)
    model.eval().set_adapter("default")
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = paca_layers(model)[0].paca_delta["default"]
    want = torch.autograd.grad(model(x).square().sum(), first)[0]
    product, todo = LinearProduct.input_gradient, []

    def torn(self, grad_output, weight, input_size):
        half = product(self, grad_output, weight, input_size)
        while todo:
            in_a_thread(todo.pop())
        return half

    def others():
        with torch.no_grad():
            model(x, adapter_names=["__base__"] * 3)
            if meanwhile == "a mixed batch and a pass":  # the same columns are in the weight again
                model(x)

    loss = model(x).square().sum()
    monkeypatch.setattr(LinearProduct, "input_gradient", torn)
    if meanwhile == "nothing":
        assert torch.equal(torch.autograd.grad(loss, first)[0], want)
        return
    todo.append(others)
    with pytest.raises(RuntimeError, match=r"in the middle of this thread's backward pass \(a mixed batch"):
        torch.autograd.grad(loss, first)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), first)[0], want)


@pytest.mark.parametrize("layer", [0, 1])
def test_inference_during_training_sees_whole_steps(monkeypatch, layer):
    """A whole step of another thread falls within the product of one layer."""
    training = Counting(layers=2)
    training.step()
    todo = tear(monkeypatch, training.step, whole=layer)
    with torch.no_grad():
        seen = training.model(training.x).flatten(1)
    assert not todo
    assert all(of_layer.eq(of_layer[0]).all() for of_layer in seen)
    assert seen[:, 0].tolist() == [8.0] * layer + [16.0] * (2 - layer)


def test_a_stock_model_would_show_that_the_race_finds_mixtures(monkeypatch):
    """The check itself: without the columns' own care a torn product is a mixture."""
    linear = nn.Linear(4, 6, bias=True, dtype=torch.float64).requires_grad_(False)
    x = torch.ones(1, 4, dtype=torch.float64)
    before = linear(x)
    tear(monkeypatch, lambda: linear.weight.add_(1))
    y = linear(x)
    after = linear(x)
    assert not torch.equal(y, before)
    assert not torch.equal(y, after)

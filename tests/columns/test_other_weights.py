"""Weights that are written around their columns, replaced for a while, or had by another process."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import paca
from models import adapted_perceptron
from paca.layers import paca_layers


def trained_perceptron(kind="linear"):
    model = adapted_perceptron(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def other_columns(layer):
    others = torch.ones(layer.in_features, dtype=torch.bool)
    others[layer.paca_indices["default"]] = False
    return others


def write_in_place(model, layer):
    with torch.no_grad():
        layer.base_layer.weight[:, other_columns(layer)] = 0


def replace(model, layer):
    weight = layer.base_layer.weight.detach().clone()
    weight[:, other_columns(layer)] = 0
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def write_through_a_state_dict(model, layer):
    for name, tensor in model.state_dict().items():
        if "base_layer.weight" in name:
            tensor[:, :] *= 0.5


@pytest.mark.parametrize("write", [write_in_place, replace, write_through_a_state_dict])
def test_a_weight_that_is_written_around_its_columns_has_no_pending_gradients(write):
    """They were of another weight, without a word: columns alone were compared."""
    model = trained_perceptron()
    loss = model(torch.randn(4, 7)).square().sum()
    write(model, paca_layers(model)[-1])
    with pytest.raises(RuntimeError, match=r"between forward and backward|written or replaced"):
        loss.backward()


def fast_weights(model, by):
    return {
        n: (p.detach() + by).requires_grad_() if p.requires_grad else p.detach().clone()
        for n, p in model.named_parameters()
    }


def test_weights_and_deltas_that_take_the_place_of_others_for_a_call_leave_the_model_as_it_was():
    """As loops of meta-learning do; every use of the model raised after it."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    before, base = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    moved = copy.deepcopy(model)
    fast = fast_weights(model, 0.1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        out = functional_call(model, fast, (x,))
        assert torch.equal(out, moved(x))
        assert torch.equal(model(x), before)
        got = torch.autograd.grad(out.square().sum(), [fast[name] for name in names])
        want = torch.autograd.grad(moved(x).square().sum(), [p for p in moved.parameters() if p.requires_grad])
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    plain = model.unload()
    assert all(torch.equal(v, base[k]) for k, v in base.items() if k in plain.state_dict())


def test_a_backward_pass_after_a_call_with_another_weight_has_that_ones_gradient():
    model, x = trained_perceptron(), torch.randn(4, 7)
    name = next(n for n, _ in reversed(list(model.named_parameters())) if n.endswith("base_layer.weight"))
    layer = paca_layers(model)[-1]
    weight = layer.base_layer.weight.detach().clone()
    weight[:, other_columns(layer)] = 0
    replaced = copy.deepcopy(model)
    with replaced.disable_adapter(), torch.no_grad():
        paca_layers(replaced)[-1].base_layer.weight[:, other_columns(layer)] = 0
    deltas, others = ([p for p in m.parameters() if p.requires_grad] for m in (model, replaced))
    got = torch.autograd.grad(functional_call(model, {name: weight}, (x,)).square().sum(), deltas)
    want = torch.autograd.grad(replaced(x).square().sum(), others)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    model(x).square().sum().backward()


def infer(model, x, results):
    results.put(model(x).detach().numpy().copy())


@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_another_process_gets_weights_of_its_own(how):
    """Its columns were written into the memory that it shared with this process."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    want = model(x).detach()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    context = torch.multiprocessing.get_context(how)
    results = context.Queue()
    processes = [context.Process(target=infer, args=(model, x, results)) for _ in range(2 if how == "fork" else 1)]
    for process in processes:
        process.start()
    model(x)
    for process in processes:
        assert torch.equal(torch.from_numpy(results.get(timeout=120)), want)
        process.join()
    assert torch.equal(model(x), want)
    paca.refresh(model)
    assert torch.equal(model(x), want)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("between", ["state dict", "disabled"])
def test_selective_checkpointing_repeats_a_pass_after_columns_were_parked(between):
    """It looked for the operators of the write among those of the first pass."""

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE

    model, x = trained_perceptron(), torch.randn(4, 7)
    deltas = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), deltas)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    loss = checkpoint(lambda x: model(x).square().sum(), x, use_reentrant=False, context_fn=contexts)
    if between == "disabled":
        with model.disable_adapter(), torch.no_grad():
            model(x)
    else:
        model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, deltas), want, strict=True))


def test_several_sets_of_weights_take_the_place_of_the_models_in_turn():
    """The second set was taken for the model's own, which was forgotten then."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    before = model(x)
    sets = [fast_weights(model, by) for by in (0.1, 0.2, 0.3)]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    outs = [functional_call(model, fast, (x,)) for fast in sets]
    again = [functional_call(model, fast, (x,)) for fast in sets]
    assert all(torch.equal(one, other) for one, other in zip(outs, again, strict=True))
    assert torch.equal(model(x), before)
    sum(out.square().sum() for out in outs).backward()
    for fast in sets:
        moved = copy.deepcopy(model)
        moved.load_state_dict({name: fast[name].detach() for name in names}, strict=False)
        want = torch.autograd.grad(moved(x).square().sum(), [p for p in moved.parameters() if p.requires_grad])
        assert all(torch.equal(fast[name].grad, one) for name, one in zip(names, want, strict=True))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("teacher", ["clones", "state dict"])
def test_a_pass_of_equal_weights_leaves_a_pending_gradient_as_it_was(teacher):
    model, x = trained_perceptron(), torch.randn(4, 7)
    deltas = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), deltas)
    state = {k: v.clone() for k, v in model.state_dict().items()} if teacher == "state dict" else fast_weights(model, 0)
    loss = model(x).square().sum()
    with torch.no_grad():
        functional_call(model, state, (x,))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, deltas), want, strict=True))


def test_a_weight_that_is_written_while_another_has_its_place_has_no_pending_gradients():
    model, x = trained_perceptron(), torch.randn(4, 7)
    loss = model(x).square().sum()
    functional_call(model, fast_weights(model, 0.1), (x,))
    write_in_place(model, paca_layers(model)[-1])
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_values_that_are_moved_as_they_are_leave_pending_gradients():
    """As when blocks are swapped out of a device's memory and back."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    loss = model(x).square().sum()
    for layer in paca_layers(model):
        layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    loss.backward()


def test_a_graph_of_deltas_that_were_put_in_goes_with_its_last_user():
    model, x = trained_perceptron(), torch.randn(4, 7)
    start = torch.zeros(1, requires_grad=True)
    fast = {n: p.detach() + start if p.requires_grad else p.detach().clone() for n, p in model.named_parameters()}
    leaf = weakref.ref(start)
    functional_call(model, fast, (x,))
    model(x)
    del fast, start
    gc.collect()
    assert leaf() is None

"""The third door: what neither a step nor a call has written is noticed when the model is entered."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from models import adapted_perceptron, perceptron
from paca.columns.state import THREAD
from paca.layers import paca_layers
from paca.tuner.entry import ModelEntry

X = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))


def deltas_of(model, name="default"):
    return [layer.paca_delta[name] for layer in paca_layers(model)]


def weights_of(model):
    return [layer.base_layer.weight for layer in paca_layers(model)]


def wanted_weights(model, kind="linear"):
    """The invariant, from the deltas as they are now."""
    stock, weights = perceptron(kind), []
    for layer, module in zip(paca_layers(model), (stock.lin1, stock.lin2), strict=True):
        total = module.weight.detach().clone()
        for name in layer.active_adapters:
            delta, columns = layer.paca_delta[name].detach(), layer.paca_indices[name]
            if isinstance(module, nn.Linear):
                total[:, columns] = torch.add(total[:, columns], delta, alpha=layer.scaling[name])
            else:
                total[columns] = torch.add(total[columns], delta.t(), alpha=layer.scaling[name])
        weights.append(total)
    return weights


def holds(model, kind="linear"):
    wanted = wanted_weights(model, kind)
    return [torch.equal(weight, want) for weight, want in zip(weights_of(model), wanted, strict=True)] == [True, True]


def entry_of(model):
    (entry,) = (
        hook.__self__
        for hook in model.get_base_model()._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), ModelEntry)
    )
    return entry


def versions(model):
    return [weight._version for weight in weights_of(model)]


def train(model, optimizer, steps=1):
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(model, rate=0.1):
    """A step that no hook and no version counter shows."""
    for delta in deltas_of(model):
        delta.data.sub_(delta.grad, alpha=rate)
        delta.grad = None


# -- what nobody wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_an_optimizer_that_is_none_is_followed_and_never_trusted(kind):
    model = adapted_perceptron(kind)
    for _ in range(4):
        model(X).square().mean().backward()
        by_hand(model)
        assert not holds(model, kind)
        model(X)
        assert holds(model, kind)
    assert not any(layer.base_layer.columns.trusted for layer in paca_layers(model))


def test_an_optimizer_that_is_none_gives_what_one_gives():
    model, twin = adapted_perceptron(), adapted_perceptron()
    optimizer = torch.optim.SGD(deltas_of(twin), lr=0.1)
    for _ in range(4):
        model(X).square().mean().backward()
        by_hand(model)
        train(twin, optimizer)
    for one, other in zip(deltas_of(model), deltas_of(twin), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("between", ["nothing", "an evaluation", "an evaluation without a mode", "a training pass"])
def test_a_data_write_after_a_backward_pass_is_seen(between):
    model = adapted_perceptron()
    model(X).square().mean().backward()
    if between == "an evaluation":
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
    elif between == "an evaluation without a mode":
        with torch.no_grad():
            model(X)
    elif between == "a training pass":
        model(X)
    by_hand(model)
    model(X)
    assert holds(model)


def test_a_data_write_that_an_evaluation_follows_is_seen():
    model = adapted_perceptron()
    model(X).square().mean().backward()
    by_hand(model)
    with torch.no_grad():
        model(X)
    assert holds(model)


def test_a_data_write_under_a_pending_graph_raises():
    model = adapted_perceptron()
    pending = model(X)
    for delta in deltas_of(model):
        delta.data.add_(1)
    model(X)
    with pytest.raises(RuntimeError, match="were modified between forward and backward"):
        pending.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_an_in_place_write_is_seen(grad):
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))  # trusted: nothing is compared
    with torch.set_grad_enabled(grad):
        model(X)
        for delta in deltas_of(model):
            delta.detach().add_(1)
        model(X)
    assert holds(model)


@pytest.mark.parametrize("grad", [True, False])
def test_a_delta_that_is_replaced_or_loaded_is_seen(grad):
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    with torch.set_grad_enabled(grad):
        first, second = paca_layers(model)
        first.paca_delta["default"] = nn.Parameter(torch.ones_like(first.paca_delta["default"]))
        second.paca_delta.load_state_dict({"default": torch.ones_like(second.paca_delta["default"])})
        model(X)
    assert holds(model)


def test_a_state_dict_that_is_loaded_is_written_at_once():
    model, other = adapted_perceptron(), adapted_perceptron(random_seed=5)
    for delta in deltas_of(other):
        delta.detach().add_(1)
    adapter = {key: value for key, value in other.state_dict().items() if "paca_" in key}
    model.load_state_dict(adapter, strict=False)
    assert holds(model)
    for one, its in zip(deltas_of(model), deltas_of(other), strict=True):
        assert torch.equal(one, its)


@pytest.mark.parametrize("change", ["eval", "no_grad", "both"])
def test_averages_that_are_swapped_in_around_an_evaluation_are_seen(change):
    model = adapted_perceptron()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    averages = [delta.detach().clone() for delta in deltas_of(model)]
    for _ in range(3):
        train(model, optimizer, steps=2)
        for average, delta in zip(averages, deltas_of(model), strict=True):
            average.lerp_(delta.detach(), 0.3)
        trained = [delta.detach().clone() for delta in deltas_of(model)]
        for delta, average in zip(deltas_of(model), averages, strict=True):
            delta.data.copy_(average)
        if change != "no_grad":
            model.eval()
        with torch.set_grad_enabled(change == "eval"):
            model(X)
        assert holds(model)
        for delta, its in zip(deltas_of(model), trained, strict=True):
            delta.data.copy_(its)
        model.train()
        model(X)
        assert holds(model)


def test_a_data_write_in_inference_mode_after_training_is_seen():
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    deltas_of(model)[0].data.add_(1)
    with torch.inference_mode():
        model(X)
    assert holds(model)
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    assert holds(model)


def test_refresh_writes_what_nothing_shows():
    model = adapted_perceptron()
    with torch.no_grad():
        model(X)
        deltas_of(model)[0].data.add_(1)
        model(X)
        assert not holds(model)  # no step, no backward pass and no change of mode around it: documented
        paca.refresh(model)
    assert holds(model)


def test_refresh_of_what_is_fresh_writes_nothing():
    model = adapted_perceptron()
    pending, before = model(X), versions(model)
    paca.refresh(model)
    assert versions(model) == before
    pending.sum().backward()


def test_a_layer_that_is_called_alone_looks_itself():
    model = adapted_perceptron()
    layer = paca_layers(model)[0]
    for delta in deltas_of(model):
        delta.detach().add_(1)
    layer(X)
    assert torch.equal(layer.base_layer.weight, wanted_weights(model)[0])


def test_a_scale_that_is_set_by_hand_is_seen():
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    model(X)
    for layer in paca_layers(model):
        layer.scaling["default"] *= 2
    model(X)
    assert holds(model)


# -- what it costs --------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


COMPARING = {"_local_scalar_dense", "equal", "item", "is_nonzero", "nonzero", "searchsorted"}
# Not `copy_`, which lays out a delta's gradient: `versions` shows what is written into weights.
WRITING = {"index_copy_", "_foreach_copy_", "_foreach_add", "index_put_", "index_add_"}


@pytest.mark.parametrize("fused", [True, False])
def test_a_trusted_training_step_writes_and_compares_nothing(fused):
    model = adapted_perceptron()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=fused)
    train(model, optimizer, steps=2)
    before = versions(model)
    with Operators() as seen:
        for _ in range(2):  # accumulation
            model(X).square().mean().backward()
    assert "mm" in seen.names
    assert not (COMPARING | WRITING) & seen.names
    assert versions(model) == before
    optimizer.step()
    before = versions(model)
    with Operators() as seen:
        model(X).square().mean().backward()
    assert not (COMPARING | WRITING) & seen.names
    assert versions(model) == before


def test_an_untrusted_pass_compares_so_that_the_check_above_can_fail():
    model = adapted_perceptron()
    model(X).square().mean().backward()
    before = versions(model)
    with Operators() as seen:
        model(X)
    assert "equal" in seen.names
    assert versions(model) == before


@pytest.mark.parametrize("trusted", [True, False])
def test_inference_compares_and_writes_nothing_after_its_first_pass(trusted):
    model = adapted_perceptron()
    if trusted:
        train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    before = versions(model)
    with torch.no_grad():
        model(X)
        with Operators() as seen:
            model(X)
    assert not (COMPARING | WRITING) & seen.names
    assert versions(model) == before


# -- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
def test_inference_does_not_look_at_gradients(trusted, monkeypatch):
    model = adapted_perceptron()
    if trusted:
        train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    model(X).square().mean().backward()

    def fail(delta):
        raise AssertionError("inference looked at a gradient, which another thread may be replacing")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "grad", property(fail), raising=False)
        with pytest.raises(AssertionError, match="looked at a gradient"):
            _ = deltas_of(model)[0].grad
        with torch.no_grad():
            model(X)
            model.eval()
            model(X)
            deltas_of(model)[0].detach().add_(1)
            model(X)
            paca_layers(model)[0](X)
    assert holds(model)


def test_inference_in_threads_while_another_runs_backward():
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    with torch.no_grad():
        want = model(X)
    before, errors, done = versions(model), [], threading.Event()

    def infer():
        try:
            while not done.is_set():
                with torch.no_grad():
                    if not torch.equal(model(X), want):
                        errors.append("another output")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        model(X).square().mean().backward()
        for delta in deltas_of(model):
            delta.grad = None
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert versions(model) == before


def test_a_pass_of_another_thread_in_another_mode_is_looked_after_once():
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    model(X)

    def infer():
        with torch.no_grad():
            model(X)

    thread = threading.Thread(target=infer)
    thread.start()
    thread.join()
    model(X)
    with Operators() as seen:
        model(X)
    assert not COMPARING & seen.names


def test_another_threads_step_leaves_the_columns_of_before_it():
    model = adapted_perceptron()
    first, second = deltas_of(model)
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    train(model, optimizer)
    with torch.no_grad():
        want = model(X)
    before, seen = versions(model), []

    def infer():
        with torch.no_grad():
            seen.append(torch.equal(model(X), want))

    class InTheMiddle(torch.optim.SGD):
        def step(self, closure=None):
            first.detach().sub_(0.1)
            thread = threading.Thread(target=infer)
            thread.start()
            thread.join()
            second.detach().sub_(0.1)

    model(X).square().mean().backward()
    InTheMiddle([first, second], lr=0.1).step()
    assert seen == [True]
    assert all(now == then + 1 for now, then in zip(versions(model), before, strict=True))
    assert holds(model)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, ValueError])
def test_after_a_pass_that_was_broken_off_layers_and_models_look_again(ends):
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True))

    def break_off(*_):
        raise ends

    handle = paca_layers(model)[1].register_forward_hook(break_off)
    with pytest.raises(ends):
        model(X)
    handle.remove()
    layer, x = paca_layers(model)[0], X
    before = layer(x)
    with torch.no_grad():
        deltas_of(model)[0].add_(1)
    assert not torch.equal(layer(x), before)  # called by itself: nobody looked for it
    assert holds(model)
    with torch.no_grad():
        deltas_of(model)[1].add_(1)
    model(X)
    assert holds(model)
    assert THREAD.passes == []
    handle = paca_layers(model)[1].register_forward_hook(break_off)
    with pytest.raises(ends):
        model(X)
    gone = weakref.ref(model)
    del model, layer, handle
    gc.collect()
    assert gone() is None  # nothing of the pass keeps it
    THREAD.passes.clear()


def test_what_is_written_while_the_model_runs_is_seen_by_the_layers_to_come():
    model = adapted_perceptron()
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True))

    def write_the_next(*_):
        with torch.no_grad():
            deltas_of(model)[1].add_(1)

    handle = paca_layers(model)[0].register_forward_hook(write_the_next)
    first = model(X)
    handle.remove()
    assert holds(model)
    assert torch.equal(model(X), first)


# -- copies ---------------------------------------------------------------------------------------------------------


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_entry(duplicate, kind):
    model = adapted_perceptron(kind)
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1))
    twin = duplicate(model)
    assert holds(twin, kind)
    model(X)
    assert holds(model, kind)
    entry, its = entry_of(model), entry_of(twin)
    assert its is not entry
    assert its.layers == paca_layers(twin)
    assert entry.layers == paca_layers(model)
    for owner, layers in ((entry, paca_layers(model)), (its, paca_layers(twin))):
        assert all(layer.base_layer.columns.entry is owner for layer in layers)
    before = versions(model)
    for delta in deltas_of(twin):
        delta.detach().add_(1)
    twin(X)
    assert holds(twin, kind)
    train(twin, torch.optim.AdamW(deltas_of(twin), lr=0.1, fused=True))
    assert holds(twin, kind)
    assert versions(model) == before
    train(model, torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True))
    assert holds(model, kind)


def test_a_copy_of_a_copy_has_its_own_entry_too():
    model = adapted_perceptron()
    twin = copy.deepcopy(copy.deepcopy(model))
    del model
    deltas_of(twin)[0].detach().add_(1)
    twin(X)
    assert holds(twin)
    assert entry_of(twin).layers == paca_layers(twin)


def test_a_copy_leaves_the_model_active_again_at_its_next_pass():
    model = adapted_perceptron()
    want = model(X)
    copy.deepcopy(model)
    assert torch.equal(model(X), want)
    assert holds(model)


def test_unloading_takes_the_entry_off_and_another_adapter_adds_none():
    model = adapted_perceptron()
    config = paca.PacaConfig(r=2, target_modules=["lin1"], init_weights=False)
    model.add_adapter("second", config)
    assert entry_of(model).layers == paca_layers(model)
    stock = model.unload()
    assert not stock._forward_pre_hooks


@pytest.mark.parametrize("numbers_given", range(20))
def test_a_step_after_a_pickle_was_read_elsewhere_is_seen(numbers_given, monkeypatch):
    """Another process counts revisions from the start: at some point it gives the numbers that the pickle had."""
    monkeypatch.setattr("paca.columns.state._REVISIONS", itertools.count(1))
    model = adapted_perceptron("linear")
    take_fused_step(model)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    monkeypatch.setattr("paca.columns.state._REVISIONS", itertools.count(1 + numbers_given))
    read = torch.load(kept, weights_only=False)
    take_fused_step(read)
    assert holds(read)


def take_fused_step(model):
    """A step whose writes no version counter shows."""
    fused = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    model(X).square().sum().backward()
    fused.step()


@pytest.mark.parametrize("copied", [False, True])
def test_a_backward_pass_does_not_survive_the_deletion_of_its_adapter(copied):
    model = adapted_perceptron("linear")
    model = copy.deepcopy(model) if copied else model
    loss = model(X).square().sum()
    model.delete_adapter("default")
    with pytest.raises(RuntimeError, match="adapter 'default'"):
        loss.backward()


@pytest.mark.parametrize("between", ["disable", "switch", "state_dict", "parked", "stepped"])
def test_a_pass_of_fake_tensors_leaves_the_weights_what_they_are(between):
    """Columns were written with no effect there. After `disable_adapter` they counted twice from then on."""
    model = adapted_perceptron()
    with torch.no_grad():
        model(X)
        if between == "parked":
            model.state_dict()
        for delta in deltas_of(model) if between == "stepped" else ():
            delta.add_(1)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            if between == "disable":
                with model.disable_adapter():
                    model(mode.from_tensor(X))
            elif between == "switch":
                model.set_adapter("default")
            elif between == "state_dict":
                model.state_dict()
            assert model(mode.from_tensor(X)).shape == (6, 5)
        model(X)
        for weight, wanted in zip(weights_of(model), wanted_weights(model), strict=True):
            torch.testing.assert_close(weight.detach(), wanted)
        stock, unloaded = perceptron(), model.unload()
        assert torch.equal(unloaded.lin1.weight, stock.lin1.weight)


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@pytest.mark.parametrize("before", ["state_dict", "a delta written", "nothing"])
def test_a_trace_of_make_fx_holds_no_write_of_columns(before, tracing_mode):
    """It raised, or recorded the write, which each run of the traced graph then repeated."""
    model = adapted_perceptron()
    with torch.no_grad():
        if before != "nothing":
            model(X)
        if before == "state_dict":
            model.state_dict()
        for delta in deltas_of(model) if before == "a delta written" else ():
            delta.add_(1)
        traced = make_fx(model, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(X)
        torch.testing.assert_close(traced(X), model(X))
        for delta in deltas_of(model):
            delta.add_(1)
        want = model(X)
        traced(X)
        torch.testing.assert_close(model(X), want)

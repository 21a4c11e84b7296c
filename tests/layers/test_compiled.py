"""Compiled layers: every invariant holds as in eager mode, with no graph break."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import paca
from models import adapt, adapted_perceptron, llama, perceptron, tokens
from paca.refresh import paca_layers

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(model, run, steps=4, write_data=False):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for step in range(steps):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = run(x).square().mean()
        loss.backward()
        if write_data:
            for p in parameters:
                p.data.sub_(0.1 * p.grad)
        else:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("write_data", [False, True])
def test_compiled_training_equals_eager_training(backend, kind, write_data):
    eager = adapted_perceptron(kind)
    want = train(eager, eager, write_data=write_data)
    model = adapted_perceptron(kind)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = train(model, compiled, write_data=write_data)
    torch.testing.assert_close(got[0], want[0])
    for p, q in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_a_language_model_compiles_whole_with_inductor():
    model = adapt(llama(), task_type="CAUSAL_LM")
    ids = tokens()
    want = model(input_ids=ids, labels=ids)
    want.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    got = compiled(input_ids=ids, labels=ids)
    got.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    for p, g in zip((p for p in model.parameters() if p.requires_grad), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-5)


def test_steps_and_switches_of_adapters_of_one_rank_recompile_nothing():
    model = adapted_perceptron(paca_alpha=6)
    model.add_adapter(
        "second", paca.PacaConfig(r=3, paca_alpha=1, init_weights=False, random_seed=9, target_modules=["lin1", "lin2"])
    )
    counter = CompileCounterWithBackend("aot_eager")
    inner = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    x = torch.randn(4, 7)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        eager = model(x)
        torch.testing.assert_close(inner(x), eager)
        train(model, inner, steps=2)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reference_pass_between_compiled_forward_and_backward(backend):
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    base = perceptron()(x)
    model.zero_grad()
    compiled = torch.compile(model, backend=backend)
    loss = compiled(x).square().sum()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(compiled(x), base)
    loss.backward()
    for p, w in zip((p for p in model.parameters() if p.requires_grad), want, strict=True):
        torch.testing.assert_close(p.grad, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_between_compiled_forward_and_backward_raises(backend):
    model = adapted_perceptron()
    loss = torch.compile(model, backend=backend)(torch.randn(4, 7)).sum()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_layer_alone_sees_changes_made_by_hand(backend):
    model = adapted_perceptron()
    layer = model.base_model.model.lin1
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(4, 7)
    for _ in range(3):
        with torch.no_grad():
            layer.paca_delta["default"].add_(0.5)
        got = compiled(x)
        torch.testing.assert_close(got, layer(x))


def test_no_copy_of_the_weight_is_made_in_a_compiled_step():
    from torch.utils._python_dispatch import TorchDispatchMode

    model = adapted_perceptron()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(4, 7)).sum().backward()
    weights = {layer.base_layer.weight.data_ptr() for layer in paca_layers(model)}
    sizes = {13 * 7, 13 * 5}

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.numel() in sizes and t.data_ptr() not in weights:
                    made.append((func, tuple(t.shape)))
            return result

    with Watch():
        compiled(torch.randn(3, 7)).sum().backward()
    assert made == []


def test_autocast_in_a_compiled_model():
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        got = torch.compile(model, backend="aot_eager")(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    got.float().sum().backward()


def test_a_copy_of_a_compiled_models_layers_finds_its_own_weight():
    import copy

    model = adapted_perceptron()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.model.lin1.base_layer.bias.add_(1)
    x = torch.randn(4, 7)
    run = torch.compile(twin, backend="aot_eager")
    torch.testing.assert_close(run(x), twin(x))

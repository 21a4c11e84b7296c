"""Compiled layers: every invariant holds as in eager mode, with no graph break."""

from __future__ import annotations

import copy
import pickle
import shutil

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import paca
from fresh_compiler import fresh_compiler  # noqa: F401
from models import adapt, adapted_perceptron, llama, perceptron, tokens
from paca.layers import paca_layers
from quantized_layers import stack

BACKENDS = ["eager", "aot_eager"]
pytestmark = pytest.mark.usefixtures("fresh_compiler")


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


@pytest.mark.slow(reason="compiles")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_a_language_model_compiles_whole_with_inductor():
    model = adapt(llama(num_hidden_layers=1), task_type="CAUSAL_LM")  # each layer takes 10 s of compilers
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
    counters.clear()  # of whatever ran before in this process
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


def test_a_reference_pass_between_compiled_forward_and_backward_raises():  # not with "eager", a backend for debugging
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    base = perceptron()(x)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(x).square().sum()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(compiled(x), base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_between_compiled_forward_and_backward_raises():  # not with "eager", a backend for debugging
    model = adapted_perceptron()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first, second = compiled(torch.randn(4, 7)).sum(), compiled(torch.randn(4, 7)).sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_layer_alone_sees_changes_made_by_hand(backend):
    model = adapted_perceptron()
    layer = model.base_model.model.lin1
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(4, 7)
    for _ in range(3):
        with torch.no_grad():
            layer.paca_delta["default"].add_(0.5)
        paca.refresh(layer)  # a layer that is compiled by itself is entered by nobody who could look
        got = compiled(x)
        torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("change", ["nothing", "switch", "step"])
def test_checkpointing_inside_a_compiled_function(change):
    model = adapted_perceptron()
    model.add_adapter(
        "second", paca.PacaConfig(r=3, init_weights=False, random_seed=9, target_modules=["lin1", "lin2"])
    )
    x = torch.randn(4, 7)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager")
    loss = compiled(x).square().sum()
    if change == "nothing":
        loss.backward()
        got = [p.grad for p in model.parameters() if p.grad is not None]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        return
    if change == "switch":
        model.set_adapter("second")
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.ones_like(p)
        torch.optim.SGD(parameters, lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Checkpointed(torch.nn.Module):
    """Blocks that are compiled in place, with checkpointing around each."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.blocks = torch.nn.ModuleList([perceptron(seed=seed) for seed in range(2)])
        for block in self.blocks:
            block.lin2 = torch.nn.Linear(13, 7)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("change", ["nothing", "state_dict", "switch", "scale", "step"])
def test_checkpointing_around_compiled_blocks(change, use_reentrant):
    torch.manual_seed(0)
    model = adapt(Checkpointed(use_reentrant), target_modules=["lin1", "lin2"])
    model.add_adapter(
        "second", paca.PacaConfig(r=3, init_weights=False, random_seed=9, target_modules=["lin1", "lin2"])
    )
    x, parameters = torch.randn(4, 7, requires_grad=True), [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), [x, *parameters]) if not use_reentrant else None
    for block in model.base_model.model.blocks:
        block.compile(backend="aot_eager")
    if use_reentrant:  # which takes no `autograd.grad`
        model(x).square().sum().backward()
        want = [p.grad.clone() for p in (x, *parameters)]
        model.zero_grad()
        x.grad = None
    loss = model(x).square().sum()
    if change == "state_dict":
        model.state_dict()
    elif change == "switch":
        model.set_adapter("second")
    elif change == "scale":
        for layer in paca_layers(model):
            layer.set_scale("default", 5.0)
    elif change == "step":
        for p in parameters:
            p.grad = torch.ones_like(p)
        torch.optim.SGD(parameters, lr=0.1).step()
        model.zero_grad()
    if change not in ("nothing", "state_dict"):
        with pytest.raises(RuntimeError, match="repeats a forward pass with"):
            loss.backward()
        return
    loss.backward()
    for p, gradient in zip((x, *parameters), want, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("park", [lambda model: model.state_dict(), copy.deepcopy])
def test_a_layer_compiled_by_itself_after_its_weight_was_parked(park):
    model, x = adapted_perceptron(), torch.randn(4, 7)
    layer = model.base_model.model.lin1
    compiled = torch.compile(layer, backend="aot_eager")
    want = compiled(x)
    park(model)
    found = compiled(x)
    assert found.requires_grad
    assert torch.equal(found, want)
    park(model)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)


def test_disabling_a_merged_adapter_in_a_compiled_model():
    model = adapted_perceptron()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 7)
    with torch.no_grad():
        adapted = compiled(x)
        model.merge_adapter()
        torch.testing.assert_close(compiled(x), adapted)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), perceptron()(x))


def test_parameters_that_are_replaced_and_scales_set_by_hand_are_seen_by_a_compiled_model():
    model = adapted_perceptron()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 7)
    compiled(x).sum().backward()
    model.zero_grad()
    state = {k: v.clone() + 0.5 if "paca_delta" in k else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    y = compiled(x)
    y.sum().backward()
    assert model.base_model.model.lin1.paca_delta["default"].grad is not None
    torch.testing.assert_close(y, model(x))
    model.base_model.model.lin1.scaling["default"] *= 3
    torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def _halved(model):
    for layer in paca_layers(model):
        layer.paca_delta["default"].mul_(0.5)


def _replaced(model):
    for layer in paca_layers(model):
        layer.paca_delta["default"].data = layer.paca_delta["default"].data * 0.5


def _scaled(model):
    for layer in paca_layers(model):
        layer.scaling["default"] *= 0.5


@pytest.mark.parametrize("change", [_halved, _replaced, _scaled])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_changes_by_hand_are_seen_by_a_compiled_base_of_a_class_of_torchs_own(change, fullgraph, copied):
    """The compiler traces such a class with its hooks: nothing was seen, and a loop by hand trained nothing."""
    base, x = nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(4, 7)
    config = paca.PacaConfig(r=4, target_modules=["0", "2"], init_weights=False)
    model = peft.get_peft_model(base, config)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=fullgraph)
    if copied:
        compiled = copy.deepcopy(compiled)
        model = compiled._orig_mod
    before = compiled(x).detach()
    change(model)
    got = [compiled(x), compiled(x)]
    want = copy.deepcopy(model)(x)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(got, [want, want])


def test_a_compiled_base_of_a_class_of_torchs_own_runs_on_without_adapters():
    base, x = nn.Sequential(nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(4, 7)
    want = base(x)
    model = peft.get_peft_model(base, paca.PacaConfig(r=4, target_modules=["0", "2"], init_weights=False))
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")
    assert not torch.allclose(compiled(x), want)
    model.unload()
    torch.testing.assert_close(compiled(x), want)


def test_a_frozen_adapter_keeps_nothing_in_a_compiled_model():
    kept = []
    model = adapted_perceptron()
    for p in model.parameters():
        p.requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        compiled(torch.randn(50, 7, requires_grad=True))
    assert (50, 3) not in kept


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
    model = adapted_perceptron()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.base_model.model.lin1.base_layer.bias.add_(1)
    x = torch.randn(4, 7)
    run = torch.compile(twin, backend="aot_eager")
    torch.testing.assert_close(run(x), twin(x))


@pytest.mark.slow(reason="compiles")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("mode", ["resident", "patched"])
def test_a_copy_of_a_model_whose_linear_layers_are_compiled_in_place_computes_by_itself(mode, copied):
    """It ran the compiled calls of the first model, on that one's weights; pickling raised."""
    if mode == "resident":
        model, x = adapted_perceptron(), torch.randn(4, 7)
    else:
        model = adapt(stack("nf4", torch.float32), target_modules=["lin1"])  # each layer takes a second or more
        x = torch.randn(4, 64)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and (mode == "resident" or "lin1" in name):
            module.compile(backend="aot_eager")
    want = model(x)
    twin = copied(model)
    with torch.no_grad():
        for delta in (p for p in twin.parameters() if p.requires_grad):
            delta.add_(1)
    found = twin(x)
    assert not torch.allclose(found, want)
    found.square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_a_state_dict_parked_is_written_before_a_compiled_model_runs(backend, fullgraph):
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        torch.testing.assert_close(compiled(x), want)
        model.state_dict()
        torch.testing.assert_close(compiled(x), want)


def test_a_compiled_function_around_a_parked_model_leaves_the_graph_or_raises():
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    with torch.no_grad():
        want = model(x)
        around = torch.compile(lambda x: model(x) * 1, backend="aot_eager")
        whole = torch.compile(lambda x: model(x) * 1, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(around(x), want)
        torch.testing.assert_close(whole(x), want)
        model.state_dict()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call paca.refresh\(model\) before this call"):
            whole(x)
        torch.testing.assert_close(around(x), want)
        torch.testing.assert_close(whole(x), want)
        model.state_dict()
        paca.refresh(model)
        torch.testing.assert_close(whole(x), want)


def test_a_compiled_graph_holds_plain_operators_only():
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    model = adapted_perceptron()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend), fullgraph=True)
    compiled(torch.randn(4, 7, requires_grad=True)).sum().backward()
    assert operators
    assert all(name.startswith("aten.") for name in operators), operators


@pytest.mark.parametrize("trained", [(), ("lin1",), ("lin2",), ("lin1", "lin2")])
@pytest.mark.parametrize("recorded", [True, False])
def test_layers_of_which_nothing_is_trained_break_no_graph(trained, recorded):
    model, x = adapted_perceptron(), torch.randn(3, 7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("paca_delta" in name and any(layer in name for layer in trained))
    want = model(x).detach()
    with torch.set_grad_enabled(recorded):
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got.detach(), want)
    assert got.requires_grad == (recorded and bool(trained))


@pytest.mark.slow(reason="compiles")
@pytest.mark.parametrize("whole", [True, False])
def test_other_deltas_that_are_put_in_within_a_compiled_function_have_the_gradients(whole):
    """They were ignored, and the model's own deltas got the gradients."""
    model, x = adapted_perceptron(), torch.randn(4, 7)
    run = model if whole else model.get_base_model()
    others = {k: (p.detach() * 1.5).requires_grad_() for k, p in run.named_parameters() if p.requires_grad}
    run(x)
    expected = torch.func.functional_call(run, others, (x,))
    want = torch.autograd.grad(expected.square().sum(), list(others.values()))

    def call(given, x):
        return torch.func.functional_call(run, given, (x,))

    compiled = torch.compile(call, backend="aot_eager")
    for between in (run, lambda x: None, run):
        out = compiled(others, x)
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.square().sum(), list(others.values()))
        torch.testing.assert_close(got, want)
        between(x)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="other deltas are in the place of its own"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(others, x)


@pytest.mark.slow(reason="compiles")
def test_calls_within_a_compiled_function_do_what_they_do_outside():
    """The compiler ended with an internal error, and left adapters half switched."""
    model, x = adapted_perceptron(), torch.randn(4, 7)
    model.add_adapter("other", paca.PacaConfig(r=2, target_modules=["lin1"], init_weights=False, random_seed=1))

    def calls(x):
        first = model(x)
        with model.disable_adapter():
            none = model(x)
        model.set_adapter("other")
        other = model(x)
        model.set_adapter("default")
        paca_layers(model)[0].merge()
        merged = model(x)
        paca_layers(model)[0].unmerge()
        return first, none, other, merged, model.state_dict()["base_model.model.lin1.base_layer.weight"]

    want, compiled = calls(x), torch.compile(calls, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want)
    assert model.active_adapter == "default"


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_with_one_adapter_is_exported(strict):
    """The export puts stand-ins in the place of deltas, which were taken for others': the layer called itself."""
    model, x = adapted_perceptron().eval(), torch.randn(4, 7)
    with torch.no_grad():
        for delta in (p for p in model.parameters() if p.requires_grad):
            delta.normal_()
        want = model(x)
        program = torch.export.export(model.get_base_model(), (x,), strict=strict).module()
        torch.testing.assert_close(program(x), want)

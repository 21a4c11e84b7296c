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
from expert_models import STACKS, mixtral
from forked_process import FORKS
from models import adapt, adapted_perceptron, base_state, perceptron, tokens
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


@pytest.mark.parametrize("how", ["forkserver", "fork"])
def test_another_process_gets_weights_of_its_own(how):
    """Its columns were written into the memory that it shared with this process."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    want = model(x).detach()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    context = FORKS if how == "forkserver" else torch.multiprocessing.get_context(how)
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


BASES = {
    "its state dict": lambda model, stock: model.state_dict(),
    "copies of it": lambda model, stock: {k: v.clone() for k, v in model.state_dict().items()},
    "the caller's own pretrained weights": lambda model, stock: {
        "base_model.model." + k.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"): v.clone()
        for k, v in stock.state_dict().items()
    },
    "what named_parameters gives": lambda model, stock: {k: p.detach().clone() for k, p in model.named_parameters()},
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("given", BASES)
def test_weights_that_are_given_for_a_call_are_not_written(given, kind, grad):
    """Columns stayed in the caller's tensors, and counted twice when those were loaded."""
    model, x, stock = trained_perceptron(kind), torch.randn(4, 7), perceptron(kind)
    deltas = [p for p in model.parameters() if p.requires_grad]
    want = model(x)
    expected = torch.autograd.grad(want.square().sum(), deltas)
    weights = BASES[given](model, stock)
    before = {name: value.clone() for name, value in weights.items()}
    with torch.set_grad_enabled(grad):
        out = functional_call(model, weights, (x,))
    assert torch.equal(out, want)
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    if grad and not any("paca_delta" in name for name in weights):
        got = torch.autograd.grad(out.square().sum(), deltas)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert torch.equal(model(x), want)


def test_a_given_weight_that_changes_before_the_backward_pass_has_no_gradients():
    model, x = trained_perceptron(), torch.randn(4, 7)
    weights = {k: v.clone() for k, v in model.state_dict().items() if "base_layer.weight" in k}
    loss = functional_call(model, weights, (x,)).square().sum()
    for weight in weights.values():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        loss.backward()


def test_re_entrant_checkpointing_of_a_call_with_given_weights_is_refused():
    """The repeated pass runs when they are gone."""
    model, x = trained_perceptron(), torch.randn(4, 7, requires_grad=True)
    weights = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    fast = weights | {k: v + 0.1 for k, v in model.state_dict().items() if "paca_delta" in k}
    holder = nn.ModuleList([model])
    call = {f"0.{k}": v for k, v in fast.items()}
    holder.forward = lambda x: checkpoint(model, x, use_reentrant=True)
    loss = functional_call(holder, call, (x,)).square().sum()
    with pytest.raises(RuntimeError, match="repeats a forward pass"):
        loss.backward()


def test_a_stack_of_experts_that_is_given_is_refused():
    model = adapt(mixtral(), target_parameters=STACKS)
    given = {k: v.clone() for k, v in model.named_parameters() if v.dim() == 3 and not v.requires_grad}
    with pytest.raises(RuntimeError, match="stack of experts"):
        functional_call(model, given, (tokens(),))


@pytest.mark.parametrize("width", [16, 256])
def test_a_weight_that_comes_back_into_the_same_memory_is_noticed(width):
    """Offloaded and loaded again, one by one: the allocator gives the memory that was just freed, where it was."""
    stock = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    model, x = adapt(copy.deepcopy(stock), target_modules=["0", "1", "2", "3"]), torch.randn(4, width)
    with torch.no_grad():
        for delta in (p for p in model.parameters() if p.requires_grad):
            delta.normal_()
    want = model(x)
    for layer, plain in zip(paca_layers(model), stock, strict=True):
        layer.base_layer.weight.data = torch.empty(0)
        layer.base_layer.weight.data = plain.weight.detach().clone()
    assert torch.equal(model(x), want)


def test_two_models_may_share_a_weight_one_at_a_time():
    """Each took the other's columns for the pretrained weight, into its files as well."""
    first, second = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    second[0].weight, x = first[0].weight, torch.randn(3, 8)
    stock = copy.deepcopy(second)
    one = adapt(first, indices={"0": [0, 1]}, target_modules=["0"])
    want = one(x)
    with pytest.raises(RuntimeError, match=r"share one weight.*'default' of the other one is active"):
        adapt(second, indices={"0": [5, 6]}, target_modules=["0"])
    assert type(second[0]) is nn.Linear
    assert torch.equal(one(x), want)
    one.base_model.disable_adapter_layers()
    other = adapt(second, indices={"0": [5, 6]}, target_modules=["0"])
    assert not torch.equal(other(x), stock(x))
    with other.disable_adapter():
        assert torch.equal(other(x), stock(x))
    with pytest.raises(RuntimeError, match="share one weight"):
        one.base_model.enable_adapter_layers()
    other.unload()
    assert torch.equal(one(x), want)


def test_two_models_may_not_share_a_weight_that_has_moved_since():
    """It goes to other memory while a state dict holds the pretrained one."""
    first, second = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    second[0].weight, x = first[0].weight, torch.randn(3, 8)
    one = adapt(first, indices={"0": [0, 1]}, target_modules=["0"])
    held = one.state_dict()
    want = one(x)
    with pytest.raises(RuntimeError, match="share one weight"):
        adapt(second, indices={"0": [5, 6]}, target_modules=["0"])
    del held
    assert torch.equal(one(x), want)


@pytest.mark.parametrize("parked", [False, True])
def test_a_snapshot_of_the_parameters_is_not_loaded_over_the_base(parked):
    """`named_parameters` shows columns, which counted twice then; the base was lost."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    best = {name: p.detach().clone() for name, p in model.named_parameters()}
    base, at_best = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    with torch.no_grad():
        for delta in (p for p in model.parameters() if p.requires_grad):
            delta.add_(0.1)
    model(x)
    if parked:
        model.state_dict()
    with pytest.raises(RuntimeError, match=r"hold the columns of adapter 'default'.*count twice"):
        model.load_state_dict(best, strict=False)
    assert torch.equal(model.state_dict()["base_model.model.lin1.base_layer.weight"], perceptron().lin1.weight)
    model.load_state_dict(base)
    assert torch.equal(model(x), at_best)
    model.load_state_dict({k: v for k, v in best.items() if "paca_delta" in k}, strict=False)
    assert torch.equal(model(x), at_best)


@pytest.mark.parametrize("grad", [True, False])
def test_deltas_that_are_given_other_memory_are_seen(grad):
    """As `vector_to_parameters` does, between two passes of one mode."""
    model, x = trained_perceptron(), torch.randn(4, 7)
    deltas = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(deltas).detach()
    other = copy.deepcopy(model)
    with torch.set_grad_enabled(grad):
        for by in (1.5, 2.0, 0.5):
            nn.utils.vector_to_parameters(vector * by, deltas)
            with torch.no_grad():
                for mine, its in zip(deltas, (p for p in other.parameters() if p.requires_grad), strict=True):
                    its.copy_(mine)
            assert torch.equal(model(x), other(x))


class Gated(nn.Module):
    """A block whose `gate` gets no gradient."""

    def __init__(self, repeat):
        super().__init__()
        self.up, self.gate, self.repeat = nn.Linear(8, 8), nn.Linear(8, 8), repeat

    def forward(self, x):
        def block(x):
            return self.up(x) * torch.sigmoid(self.gate(x)).detach()

        return checkpoint(block, x, use_reentrant=False) if self.repeat else block(x)


@pytest.mark.parametrize("change", ["nothing", "step", "scale"])
def test_checkpointing_sees_what_changed_in_a_layer_whose_own_gradient_is_not_asked_for(change):
    found = []
    for repeat in (False, True):
        torch.manual_seed(0)
        model = adapt(Gated(repeat), target_modules=["up", "gate"], init_weights=False)
        x, (up, gate) = torch.randn(3, 8, requires_grad=True), paca_layers(model)
        loss = model(x).square().sum()
        if change == "step":
            gate.paca_delta["default"].grad = torch.ones_like(gate.paca_delta["default"])
            torch.optim.SGD([gate.paca_delta["default"]], lr=0.1).step()
        elif change == "scale":
            gate.set_scale("default", 3.0)
        if repeat and change != "nothing":
            with pytest.raises(RuntimeError, match="repeats a forward pass with adapter 'default' active"):
                loss.backward()
        else:
            loss.backward()
            found.append(up.paca_delta["default"].grad)
    assert change != "nothing" or torch.equal(*found)


class Sliced(nn.Module):
    """Three layers whose weights are slices of one tensor, as transformers loads some that a checkpoint has as one: a
    write to one of them moves the version counter of all."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = (torch.randn(96, 32) * 0.2).chunk(3)
        for name, part in zip("qkv", parts, strict=True):
            layer = nn.Linear(32, 32, bias=False)
            layer.weight = nn.Parameter(part if sliced else part.clone())
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(torch.tanh(self.k(torch.tanh(self.q(x)))))


@pytest.mark.parametrize(("selection", "r"), [("random", 3), ("random_blocks", 16)])
def test_weights_that_are_slices_of_one_tensor_train_as_others_do(selection: str, r: int) -> None:
    x = torch.randn(5, 32)
    seen: list[list[torch.Tensor]] = []
    for sliced in (False, True):
        model = adapt(Sliced(sliced), selection=selection, r=r, target_modules=["q", "k", "v"], init_weights=True)
        before = base_state(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        outputs = []
        for _ in range(3):
            outputs.append(model(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                outputs.append(model.eval()(x))
            model.train()
        model.merge_adapter()
        outputs.append(model(x))
        model.unmerge_adapter()
        outputs.append(model(x))
        assert all(torch.equal(value, before[name]) for name, value in base_state(model).items())
        seen.append(outputs)
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_what_is_written_into_a_slice_is_no_write_into_the_others() -> None:
    base, x = Sliced(True), torch.randn(5, 32)
    weights = [layer.weight for layer in (base.q, base.k, base.v)]
    storages = {weight.untyped_storage()._cdata for weight in weights}
    model = adapt(base, target_modules=["q", "k", "v"])
    assert len(storages) == 1
    assert [layer.base_layer.weight for layer in paca_layers(model)] == weights  # the same objects, in the same memory
    assert {weight.untyped_storage()._cdata for weight in weights} == storages
    deltas = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.SGD([delta], lr=0.1) for delta in deltas]
    for _ in range(2):  # one after the other
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model(x)
    for between in (model.state_dict, partial(copy.deepcopy, model), partial(disabled_pass, model, x)):
        loss = model(x).square().mean()
        between()
        loss.backward()
    average = {name: p.detach() * 0.9 for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(average, strict=False)
    model(x).square().mean().backward()
    for delta in deltas:
        delta.data.sub_(delta.grad)
    model.state_dict()
    model.unload()


def disabled_pass(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(x)

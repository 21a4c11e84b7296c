"""Mixed batches through every kind of layer but linear ones: embeddings, convolutions, quantized weights, experts."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from distributed.threads import check_at_once
from expert_models import FAMILIES, IMPLEMENTATIONS, STACKS
from fresh_compiler import fresh_compiler  # noqa: F401
from layers.small_networks import NETWORKS, TARGETS, example, network
from models import adapt, llama, tokens
from paca.columns.resident import WRITING
from paca.layers import overlaid_weight, paca_layers
from paca.layers.expert_view import StackView
from paca.layers.mixed_batch import current_mixed_batch
from paca.tuner import entry
from paca.tuner.entry import write_layers
from quantized_layers import REAL, forward_only_stack, stack
from reference import dense_weight

BASE = "__base__"
NAMES = ["small", "default", BASE, "small", "other"]  # sorted by adapter, a permutation that is not its own inverse
FORWARD_ONLY = "gptqmodel.nn_modules.qlinear.torch"


def with_three(model: nn.Module, targets: list[str], fewer: list[str], rank: int, **settings):
    """Adapters of rank 2, 1 and `rank`, the last one in `fewer` layers only; `default` is active."""
    key = settings.pop("key", "target_modules")
    torch.manual_seed(5)
    adapted = adapt(model, r=2, paca_alpha=4, **{key: targets}, **settings)
    own = {"init_weights": False, **settings}
    adapted.add_adapter("small", paca.PacaConfig(r=1, paca_alpha=3, random_seed=1, **{key: targets}, **own))
    adapted.add_adapter("other", paca.PacaConfig(r=rank, random_seed=2, **{key: fewer}, **own))
    return adapted.eval()


def small_network(kind: str, dtype: torch.dtype = torch.float64):
    return with_three(network(kind, dtype), TARGETS, TARGETS[1:], 3)


def samples(kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.cat([example(kind, dtype, seed) for seed in range(3)])[: len(NAMES)]


def quantized(kind: str, dtype: torch.dtype = torch.float32):
    model = stack(kind, dtype) if kind in REAL else forward_only_stack(kind, dtype=dtype)
    return with_three(model, ["lin1", "lin2"], ["lin1"], 7)


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(len(NAMES), 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def experts(family: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32):
    model = FAMILIES[family](implementation).to(dtype)
    return with_three(model, STACKS, STACKS[1:], 5, key="target_parameters", task_type="CAUSAL_LM")


def alone(model, names, run):
    """`run(sample)` of each sample, with its adapter made the active one."""
    results = []
    for sample, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                results.append(run(sample))
        else:
            model.set_adapter(name)
            results.append(run(sample))
    model.base_model.set_adapter("default")
    return results


def gradients(model, losses, *inputs):
    """The gradients of every delta and of `inputs`; `losses` yields after it has made an adapter active."""
    deltas = {name: p for name, p in model.named_parameters() if "paca_delta" in name}
    for p in (*deltas.values(), *inputs):
        p.grad = None
    for loss in losses:
        model.set_requires_grad(["default", "small", "other"])
        value = loss()
        if value.requires_grad:  # the base model's sample has nothing to train if its input needs no gradient
            value.backward()
    return {**{name: p.grad for name, p in deltas.items()}, **{str(n): x.grad for n, x in enumerate(inputs)}}


def losses_alone(model, names, loss):
    for sample, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                yield lambda sample=sample: loss(sample)
        else:
            model.set_adapter(name)
            yield lambda sample=sample: loss(sample)


def check_gradients(model, x, run_mixed, run_one, close):
    weights = torch.randn(run_mixed(x).shape, generator=torch.Generator().manual_seed(2)).to(run_mixed(x))
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    mixed = gradients(model, [lambda: (run_mixed(x) * weights).sum()], *inputs)
    one = gradients(
        model, losses_alone(model, NAMES, lambda n: (run_one(x[n : n + 1]) * weights[n : n + 1]).sum()), *inputs
    )
    given = [name for name, gradient in one.items() if gradient is not None]
    assert sum("paca_delta" in name for name in given) >= 5
    for name, want in one.items():
        if want is None:  # a weight that no sample of this adapter went through
            assert mixed[name] is None or not mixed[name].any()
        else:
            close(mixed[name], want)


# -- convolutions and embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_small_network_gives_each_sample_its_adapter_and_each_adapter_its_gradient(kind):
    model, x = small_network(kind), samples(kind)

    def close(got, want):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * max(1.0, float(want.abs().max())))

    with torch.no_grad():
        mixed = model(x, adapter_names=NAMES)
        with model.disable_adapter():
            base = model(x)
        for n, want in enumerate(alone(model, NAMES, lambda n: model(x[n : n + 1])[0])):
            close(mixed[n], want)
        close(mixed[2], base[2])  # some CPUs' kernels round rows by how many there are
        assert all(not torch.allclose(mixed[n], base[n], atol=1e-3) for n in (0, 1, 3, 4))
    if kind != "words":  # one of its embeddings divides by how often a token occurs, in all samples of an adapter
        check_gradients(model, x, lambda x: model(x, adapter_names=NAMES), lambda x: model(x), close)


def dense_conv(x, layer, groups):
    """A convolution of `x` per group with a dense weight, float64."""
    base, result = layer.base_layer, []
    for n in range(len(x)):
        weight = base.state_dict()["weight"].double().clone()
        for rows, delta, indices, scale in groups:
            if n in rows.tolist():
                weight = weight.index_add(1, indices, scale * delta.double())
        result.append(F.conv2d(x[n : n + 1].double(), weight, base.bias.double(), base.stride, base.padding))
    return torch.cat(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_convolution_agrees_with_a_dense_reference_in_float64(dtype):
    torch.manual_seed(0)
    model = with_three(nn.Sequential(nn.Conv2d(5, 4, 3, padding=1, stride=2)).to(dtype), ["0"], ["0"], 5)
    layer = paca_layers(model)[0]
    deltas = [layer.paca_delta[name] for name in ("default", "small", "other")]
    x = torch.randn(len(NAMES), 5, 7, 6).to(dtype).requires_grad_()
    rows = {"default": [1], "small": [0, 3], "other": [4]}
    model.set_requires_grad(list(rows))

    y = model(x, adapter_names=NAMES)
    y.double().square().sum().backward()
    got = [x.grad, *(d.grad for d in deltas)]
    x64 = x.detach().double().requires_grad_()
    copies = [d.detach().double().requires_grad_() for d in deltas]
    groups = [
        (torch.tensor(rows[name]), d, layer.paca_indices[name], layer.scaling[name])
        for name, d in zip(rows, copies, strict=True)
    ]
    want = dense_conv(x64, layer, groups)
    want.square().sum().backward()
    unit = torch.finfo(dtype).eps
    assert (y.double() - want).norm() <= 2 * unit * want.norm()
    for g, w in zip(got, (x64.grad, *(c.grad for c in copies)), strict=True):
        assert (g.double() - w).norm() <= 4 * unit * w.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_an_embedding_gives_what_each_adapter_gives_alone_bit_for_bit(dtype):
    model = with_three(nn.Sequential(nn.Embedding(11, 6)).to(dtype), ["0"], ["0"], 6)
    ids = torch.randint(0, 11, (len(NAMES), 4))
    mixed = model(ids, adapter_names=NAMES)
    for n, want in enumerate(alone(model, NAMES, lambda n: model(ids[n : n + 1])[0])):
        assert torch.equal(mixed[n], want)


def test_an_embeddings_gradient_is_that_of_its_adapters_samples():
    for settings in ({}, {"padding_idx": 3}, {"scale_grad_by_freq": True}):
        torch.manual_seed(0)
        model = with_three(nn.Sequential(nn.Embedding(5, 6, **settings)).double(), ["0"], ["0"], 6)
        deltas = paca_layers(model)[0].paca_delta
        ids = torch.randint(0, 5, (len(NAMES), 4))
        weights = torch.randn(len(NAMES), 4, 6, dtype=torch.float64)
        model.set_requires_grad(["default", "small", "other"])
        (model(ids, adapter_names=NAMES) * weights).sum().backward()
        got = {name: delta.grad.clone() for name, delta in deltas.items()}
        for name in got:
            rows = [n for n, other in enumerate(NAMES) if other == name]
            model.set_adapter(name)
            model.zero_grad()
            (model(ids[rows]) * weights[rows]).sum().backward()
            torch.testing.assert_close(got[name], deltas[name].grad, rtol=1e-13, atol=1e-13)


def test_only_the_chosen_channels_of_an_adapters_samples_are_kept():
    model = with_three(nn.Sequential(nn.Conv2d(8, 4, 3)).float(), ["0"], ["0"], 3)
    model.set_requires_grad(["default", "small", "other"])
    x = torch.randn(len(NAMES), 8, 6, 6)
    sizes = kept(lambda: model(x, adapter_names=NAMES), x, *model.parameters())
    #   1 sample, 2 channels; 2 samples, 1 channel; 1 sample, 3 channels: 36 values each
    assert sizes == sorted([1 * 2 * 36, 2 * 1 * 36, 1 * 3 * 36])


def kept(run, *known):
    """The sizes of the float tensors that autograd keeps, those of `known` storages left out."""
    there = {t.untyped_storage().data_ptr() for t in known}
    found = []

    def pack(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in there:
            found.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(found)


# -- weights that are not written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*REAL, FORWARD_ONLY])
def test_quantized_layers_give_each_sample_its_adapter(kind):
    model, x = quantized(kind), features()

    def close(got, want):
        assert (got.double() - want.double()).norm() <= 8 * torch.finfo(torch.float32).eps * want.double().norm()

    with torch.no_grad():
        mixed = model(x, adapter_names=NAMES)
        with model.disable_adapter():
            base = model(x)
        for layer in paca_layers(model):  # layer by layer: PEFT itself leaves adapter_names out when all are disabled
            layer.enable_adapters(False)
        assert torch.equal(model(x, adapter_names=NAMES), base)
        for layer in paca_layers(model):
            layer.enable_adapters(True)
        for n, want in enumerate(alone(model, NAMES, lambda n: model(x[n : n + 1])[0])):
            close(mixed[n], want)
        close(mixed[2], base[2])  # some CPUs' kernels round rows by how many there are
        assert all(not torch.allclose(mixed[n], base[n], rtol=0.01, atol=0.01) for n in (0, 1, 3, 4))
    if kind != "int8":  # there the stock layer's own gradient of the base model's sample is rounded to float16
        check_gradients(model, x, lambda x: model(x, adapter_names=NAMES), lambda x: model(x), close)


@pytest.mark.parametrize("kind", ["nf4", "int8", FORWARD_ONLY])
def test_a_quantized_layer_agrees_with_a_dense_reference_in_float64(kind):
    model, x = quantized(kind), features()
    layer = paca_layers(model)[0]
    base = layer.base_layer
    weight = base.dequantized() if kind == FORWARD_ONLY else base.quantization.dequantize(base)
    taken = []
    layer.register_forward_hook(lambda module, args, output: taken.append(output))
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    for n, name in enumerate(NAMES):
        if name == BASE:
            continue
        dense = dense_weight(weight, [(layer.paca_delta[name], layer.paca_indices[name], layer.scaling[name])])
        want = x[n].double() @ dense.T + base.bias.detach().double()
        assert (taken[0][n].double() - want).norm() <= 8 * torch.finfo(torch.float32).eps * want.norm()


@pytest.mark.parametrize("kind", ["nf4", "hqq", FORWARD_ONLY])
def test_over_a_quantized_weight_only_the_chosen_inputs_of_an_adapters_samples_are_kept(kind):
    model, x = quantized(kind), features().requires_grad_()
    model.set_requires_grad(["default", "small", "other"])
    known = [x, *model.parameters(), *model.buffers()]
    layer = paca_layers(model)[0]
    sizes = kept(lambda: layer_alone(layer, x), *known)
    assert sizes == sorted([1 * 3 * 2, 2 * 3 * 1, 1 * 3 * 7])


def layer_alone(layer, x):
    from paca.layers.mixed_batch import MixedBatch, running

    with running(MixedBatch(NAMES)):
        return layer(x)


def test_a_merge_between_a_mixed_pass_and_its_backward_pass_raises():
    model = quantized("nf4")
    model.set_requires_grad(["default", "small", "other"])
    loss = model(features().requires_grad_(), adapter_names=NAMES).sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged, unmerged or loaded"):
        loss.backward()


# -- stacks of experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_give_each_samples_tokens_its_adapter(family, implementation):
    model, ids = experts(family, implementation), tokens(len(NAMES), 7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        mixed = model(input_ids=ids, adapter_names=NAMES).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        for n, want in enumerate(alone(model, NAMES, lambda n: model(input_ids=ids[n : n + 1]).logits[0])):
            torch.testing.assert_close(mixed[n], want, rtol=1e-4, atol=1e-4)
        assert all(not torch.allclose(mixed[n], base[n], atol=1e-2) for n in (0, 1, 3, 4))
        assert torch.equal(model(input_ids=ids).logits, before)  # the active adapter again
    assert all("forward" not in vars(m) for m in model.modules())

    def close(got, want):
        assert (got - want).norm() <= 1e-4 * want.norm()

    check_gradients(
        model,
        ids,
        lambda ids: model(input_ids=ids, adapter_names=NAMES).logits,
        lambda ids: model(input_ids=ids).logits,
        close,
    )


@torch.no_grad()
def test_experts_generate_with_each_samples_adapter_and_its_beams():
    model, ids = experts("mixtral"), tokens(len(NAMES), 5)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **arguments)
    want = alone(model, NAMES, lambda n: model.generate(input_ids=ids[n : n + 1], **arguments)[0])
    assert torch.equal(mixed, torch.stack(want))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_run_mixed_batches_and_ordinary_passes_in_several_threads(implementation):
    model, ids = experts("mixtral", implementation), tokens(3, 4)
    batches = [{}, {"adapter_names": ["default", "small", BASE]}, {"adapter_names": ["other", BASE, "default"]}]
    check_at_once([lambda names=names: model(input_ids=ids, **names).logits for names in batches], 10)


@pytest.mark.parametrize("kind", ["nf4", "int8", FORWARD_ONLY, *NETWORKS])
def test_other_layers_run_mixed_batches_and_ordinary_passes_in_several_threads(kind):
    model, x = (small_network(kind), samples(kind)) if kind in NETWORKS else (quantized(kind), features())
    batches = [{}, {"adapter_names": NAMES}, {"adapter_names": list(reversed(NAMES))}]
    check_at_once([lambda names=names: model(x, **names) for names in batches])


class Watched:
    """`WRITING`, which tells when a thread has to wait for it."""

    def __init__(self):
        self.waited_for = threading.Event()

    def __enter__(self):
        if not WRITING.acquire(blocking=False):
            self.waited_for.set()
            WRITING.acquire()

    def __exit__(self, *raised):
        WRITING.release()


@torch.no_grad()
def test_a_quantized_layer_keeps_what_its_thread_wants_until_it_has_taken_it(monkeypatch):
    """An ordinary pass of another thread comes after the mixed batch's write, or waits for the lock."""
    model, x = quantized("nf4"), features()
    want, ordinary, seen = model(x, adapter_names=NAMES), model(x), []
    lock, columns = Watched(), paca_layers(model)[0].base_layer.columns
    note = columns.note_forward

    @torch.no_grad()
    def run():
        seen.append(model(x))
        lock.waited_for.set()

    def noted():
        if other.ident is None:  # between the write and what the pass takes
            other.start()
            assert lock.waited_for.wait(10)
        note()

    other = threading.Thread(target=run)
    monkeypatch.setattr(entry, "WRITING", lock)
    monkeypatch.setattr(overlaid_weight, "WRITING", lock)
    monkeypatch.setattr(columns, "note_forward", noted)
    mixed = model(x, adapter_names=NAMES)
    other.join(10)
    assert torch.equal(mixed, want)
    assert torch.equal(seen[0], ordinary)


@torch.no_grad()
def test_another_batch_that_begins_leaves_the_stacks_to_the_one_that_runs(monkeypatch):
    """What another thread does before its own forward pass, at the worst moment."""
    model, ids = experts("mixtral"), tokens(len(NAMES), 4)
    want = model(input_ids=ids, adapter_names=NAMES).logits
    run, seen = StackView.__getitem__, []

    def begins(view, index):
        batch = current_mixed_batch()
        running, batch.adapter = batch.adapter, BASE
        write_layers(paca_layers(model))
        batch.adapter = running
        seen.append(running)
        return run(view, index)

    monkeypatch.setattr(StackView, "__getitem__", begins)
    model.get_base_model().set_experts_implementation("eager")
    got = model(input_ids=ids, adapter_names=NAMES).logits
    assert {"default", "other"} <= set(seen)
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_experts_that_get_tokens_of_unknown_samples_are_refused():
    model, ids = experts("mixtral"), tokens(len(NAMES), 7)
    block = model.base_model.model.model.layers[0].mlp
    before = model(input_ids=ids).logits
    dropping = block.experts.register_forward_pre_hook(lambda m, args: tuple(a[:-1] for a in args))
    # The hook runs before the experts' forward, where tokens are shared out.
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts gets \(34, 64\), which is not the tokens of all"):
        model(input_ids=ids, adapter_names=NAMES)
    dropping.remove()
    assert torch.equal(model(input_ids=ids).logits, before)


# -- compiled models --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_convolutions_and_embeddings_run_mixed_batches_and_train_on_them():
    model, x = small_network("words"), samples("words")
    with torch.no_grad():
        want, ordinary = model(x, adapter_names=NAMES), model(x)
        model.get_base_model().compile(backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(model(x), ordinary)
            torch.testing.assert_close(model(x, adapter_names=NAMES), want)
    got = gradients(model, [lambda: model(x, adapter_names=NAMES).square().sum()])
    twin = small_network("words")
    want = gradients(twin, [lambda: twin(x, adapter_names=NAMES).square().sum()])
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient)


# -- embeddings of a language model -----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_language_models_embedding_and_output_layer_generate_by_sample():
    model = with_three(llama().double(), ["embed_tokens", "lm_head"], ["lm_head"], 7, task_type="CAUSAL_LM")
    ids = tokens(len(NAMES), 5)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **arguments)
    want = alone(model, NAMES, lambda n: model.generate(input_ids=ids[n : n + 1], **arguments)[0])
    assert torch.equal(mixed, torch.stack(want))


@torch.no_grad()
def test_a_mixed_batch_through_a_convolution_writes_no_weight_and_allocates_none():
    model = with_three(nn.Sequential(nn.Conv2d(64, 32, 3)).float(), ["0"], ["0"], 3)
    x = torch.randn(len(NAMES), 64, 3, 3)
    model(x, adapter_names=NAMES)
    weight = paca_layers(model)[0].base_layer.weight
    version = weight._version
    with Largest() as largest:
        layer_alone(paca_layers(model)[0], x)
    assert weight._version == version
    assert largest.numel < weight.numel() / 2


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result

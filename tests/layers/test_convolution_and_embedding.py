"""The invariants of design section 3 on adapted convolutions and embeddings, within a model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import paca
from fresh_compiler import fresh_compiler  # noqa: F401
from layers.small_networks import NETWORKS, TARGETS, adapted_network, example, network
from models import adapt, base_state
from paca.layers import PacaConvolution, PacaEmbedding
from reference import nearest

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
kinds = pytest.mark.parametrize("kind", NETWORKS)


def layer_of(model, name="first"):
    return model.base_model.model.get_submodule(name)


def deltas(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model):
    return [p.grad.clone() for p in deltas(model)]


def add_second(model, **settings):
    config = {"r": 1, "init_weights": False, "random_seed": 7, "target_modules": TARGETS, **settings}
    model.add_adapter("second", paca.PacaConfig(**config))


def dense_copy(model, kind):
    """A stock network in float64 that holds, as trainable weights, what the adapted one's weights hold."""
    twin = network(kind, torch.float64)
    with torch.no_grad():
        for name in TARGETS:
            layer, base = twin.get_submodule(name), layer_of(model, name).base_layer
            layer.weight.copy_(base.weight)
            if base.bias is not None:
                layer.bias.copy_(base.bias)
    return twin


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", [False, True])
def test_outputs_and_gradients_agree_with_a_dense_float64_network(kind, dtype, several):
    model = adapted_network(kind, dtype)
    if several:
        add_second(model)
        model.base_model.set_adapter(["default", "second"])
    x = example(kind, dtype)
    y = model(x)
    weights = torch.randn(y.shape).to(dtype)
    y.backward(weights)
    twin = dense_copy(model, kind)
    want = twin(x if kind == "words" else x.double())
    want.backward(weights.double())
    unit = 40 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps  # deltas: float32 at least
    torch.testing.assert_close(y.double(), want, rtol=unit, atol=unit)
    for name in TARGETS:
        layer = layer_of(model, name)
        for adapter in layer.active_adapters:
            expected = layer.scaling[adapter] * twin.get_submodule(name).weight.grad[:, layer.paca_indices[adapter]]
            got = layer.paca_delta[adapter].grad.double()
            assert got.shape == layer.paca_delta[adapter].shape
            torch.testing.assert_close(got, expected, rtol=unit, atol=unit * float(expected.abs().max()))


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_the_pretrained_one_plus_the_scaled_columns(kind, dtype):
    model = adapted_network(kind, dtype)
    stock = network(kind, dtype)
    with torch.no_grad():
        model(example(kind, dtype))
    for name in TARGETS:
        layer, original = layer_of(model, name), stock.get_submodule(name).weight
        want = original.detach().double().clone()
        for column, position in enumerate(layer.paca_indices["default"].tolist()):
            want[:, position] += layer.scaling["default"] * layer.paca_delta["default"].detach().double()[:, column]
        rounded = torch.where(want == 0, 0, nearest(want, dtype))  # zero has no neighbour below in its bits
        assert torch.equal(layer.base_layer.weight, rounded)
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), want - original.detach().double(), rtol=1e-6, atol=1e-6
        )


@kinds
def test_a_new_adapter_changes_no_output_and_no_input_gradient(kind):
    stock = network(kind)
    x = example(kind)
    if kind != "words":
        x.requires_grad_()
    y = stock(x)
    want = torch.autograd.grad(y.square().sum(), x)[0] if kind != "words" else None
    model = adapted_network(kind, init_weights=True)
    mine = model(x)
    assert torch.equal(mine, y)
    if want is not None:
        torch.testing.assert_close(torch.autograd.grad(mine.square().sum(), x)[0], want)


@kinds
def test_training_follows_a_dense_float64_run(kind):
    model = adapted_network(kind, torch.float64)
    originals = base_state(model)
    shadow = [p.detach().clone().requires_grad_() for p in deltas(model)]
    mine, theirs = torch.optim.AdamW(deltas(model), lr=0.02), torch.optim.AdamW(shadow, lr=0.02)
    twin = network(kind, torch.float64)
    for step in range(4):
        x = example(kind, torch.float64, seed=step)
        state = dict(originals)
        for name, delta in zip(TARGETS, shadow, strict=True):
            layer = layer_of(model, name)
            state[f"{name}.weight"] = originals[f"{name}.weight"].index_add(
                1, layer.paca_indices["default"], delta, alpha=layer.scaling["default"]
            )
        loss, want = model(x).square().mean(), torch.func.functional_call(twin, state, (x,)).square().mean()
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
        loss.backward()
        want.backward()
        # torch's padding row and frequencies are a matter of its embedding's backward pass, and so of functional_call's
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(deltas(model), shadow, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_disabling_merging_and_unmerging_are_bitwise(kind, dtype):
    model = adapted_network(kind, dtype)
    stock, x = network(kind, dtype), example(kind, dtype)
    with torch.no_grad():
        want, y = stock(x), model(x)
        assert not torch.equal(y, want)
        with model.disable_adapter():
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), y)
        model.merge_adapter()
        assert torch.equal(model(x), y)
        model.unmerge_adapter()
        with model.disable_adapter():
            for name in TARGETS:
                assert torch.equal(layer_of(model, name).base_layer.weight, stock.get_submodule(name).weight)
        assert torch.equal(model(x), y)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        assert torch.equal(merged(x), y)
        unloaded = model.unload()
        assert torch.equal(unloaded(x), want)
    for network_ in (merged, unloaded):
        assert [type(m) for m in network_.modules()] == [type(m) for m in stock.modules()]


@kinds
def test_state_dicts_and_copies_hold_the_pretrained_weight(kind):
    model, stock, x = adapted_network(kind), network(kind), example(kind)
    y = model(x)
    for state in (model.state_dict(), copy.deepcopy(model).state_dict()):
        for name in TARGETS:
            assert torch.equal(state[f"base_model.model.{name}.base_layer.weight"], stock.get_submodule(name).weight)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(model(x), y)


@kinds
def test_a_reference_pass_before_the_backward_pass_does_not_disturb_it(kind):
    model, x = adapted_network(kind), example(kind)
    model(x).square().sum().backward()
    want = gradients(model)
    model.zero_grad()
    loss = model(x).square().sum()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    for g, w in zip(gradients(model), want, strict=True):
        assert torch.equal(g, w)


@kinds
def test_a_step_between_forward_and_backward_raises(kind):
    model = adapted_network(kind)
    loss = model(example(kind)).sum()
    with torch.no_grad():
        layer_of(model, "third").paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing_bitwise(kind, use_reentrant):
    model, x = adapted_network(kind), example(kind)
    if kind != "words":
        x.requires_grad_()
    model(x).square().sum().backward()
    want = gradients(model)
    model.zero_grad()
    inner = model.base_model.model
    if kind == "words" and use_reentrant:  # needs an input with a gradient
        hidden = inner.first(x)
        y = checkpoint(inner.second, torch.tanh(hidden).transpose(1, 2), use_reentrant=True)[..., 1:-1]
        y = y + inner.third(x).mT
    else:
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for g, w in zip(gradients(model), want, strict=True):
        assert torch.equal(g, w)


@kinds
def test_checkpointing_that_recomputes_with_another_adapter_raises(kind):
    model = adapted_network(kind)
    add_second(model, r=2)
    loss = checkpoint(model, example(kind), use_reentrant=False).sum()
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="adapter 'second' active, but it first ran with other"):
        loss.backward()


@kinds
def test_autocast_gives_the_stock_networks_output_and_trains(kind):
    model, x = adapted_network(kind), example(kind)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(y, merged(x))
        loss = y.float().square().mean()
    loss.backward()
    half = gradients(model)
    model.zero_grad()
    model(x).square().mean().backward()
    for g, w in zip(half, gradients(model), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=0.1, atol=0.03 * float(w.abs().max()))


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_a_compiled_network_trains_as_the_eager_one_without_a_graph_break(kind, dtype, autocast_adapter_dtype):
    def run(compiled):
        config = paca.PacaConfig(r=2, paca_alpha=4, target_modules=TARGETS)
        model = peft.get_peft_model(network(kind, dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        forward = model.get_base_model()
        if compiled:
            forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
        optimizer, losses = torch.optim.SGD(deltas(model), lr=0.05), []
        for step in range(3):
            loss = forward(example(kind, dtype, seed=step)).square().mean()
            loss.backward()
            with torch.no_grad(), model.disable_adapter():
                losses.append(model.get_base_model()(example(kind, dtype)).sum())
            losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return losses, deltas(model)

    for eager, compiled in zip(run(False), run(True), strict=True):
        for e, c in zip(eager, compiled, strict=True):
            torch.testing.assert_close(c, e, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
@kinds
def test_a_step_between_compiled_forward_and_backward_raises(kind):
    model = adapted_network(kind)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(deltas(model), lr=0.05)
    first, second = compiled(example(kind)).sum(), compiled(example(kind)).sum()
    first.backward()
    optimizer.step()  # writes the columns
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.usefixtures("fresh_compiler")
@kinds
def test_a_switch_between_compiled_forward_and_backward_raises(kind):
    model = adapted_network(kind)
    loss = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)(example(kind)).sum()
    with torch.no_grad(), model.disable_adapter():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("fresh_compiler")
@kinds
def test_a_compiled_network_under_autocast_and_without_gradients(kind):
    model, x = adapted_network(kind), example(kind)
    forward = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        assert torch.equal(forward(x), want)
        with torch.no_grad():
            assert torch.equal(forward(x), want)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_network_sends_gradients_to_its_input_and_biases():
    model = adapted_network("images")
    model.base_model.model.first.base_layer.bias.requires_grad_()
    x = example("images").requires_grad_()
    forward = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    grads = []
    for run in (model, forward):
        x.grad = None
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([x.grad, *gradients(model)])
    for e, c in zip(*grads, strict=True):
        torch.testing.assert_close(e, c)


# -- files -----------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(tmp_path, kind, low_cpu_mem_usage):
    model, x = adapted_network(kind), example(kind)
    y = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 6
    for name in TARGETS:
        layer = layer_of(model, name)
        weight = layer.base_layer.weight
        assert tensors[f"base_model.model.{name}.paca_delta"].shape == (weight.shape[0], 2, *weight.shape[2:])
        assert tensors[f"base_model.model.{name}.paca_indices"].tolist() == layer.paca_indices["default"].tolist()
    loaded = peft.PeftModel.from_pretrained(network(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(x), y)


def test_a_delta_of_another_kernel_is_refused(tmp_path):
    adapted_network("images").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.first.paca_delta"
    tensors[name] = tensors[name][..., :2].contiguous()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"first\.paca_delta has shape \(8, 2, 3, 2\).*\(8, 2, 3, 3\)"):
        peft.PeftModel.from_pretrained(network("images"), tmp_path)


def test_unsorted_columns_are_sorted_with_their_kernels(tmp_path):
    model = adapted_network("images", r=3)
    x = example("images")
    y = model(x)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in TARGETS:
        for kind, dim in (("delta", 1), ("indices", 0)):
            key = f"base_model.model.{name}.paca_{kind}"
            tensors[key] = tensors[key].flip(dim).contiguous()
    save_file(tensors, path)
    assert torch.equal(peft.PeftModel.from_pretrained(network("images"), tmp_path)(x), y)


def lora_of(layer):
    """The LoRA weights that change a layer as its adapter does: one-hot in the columns, the delta over them."""
    columns, weight = layer.columns_of("default"), layer.base_layer.weight
    delta, r = columns.scale * columns.delta.detach(), columns.indices.numel()
    if isinstance(layer, PacaEmbedding):  # weight + (B @ A).T
        b = torch.zeros(weight.shape[1], r)
        b[columns.indices, torch.arange(r)] = 1
        return {"lora_embedding_A": delta.T.contiguous(), "lora_embedding_B": b}
    taps = weight[0, 0].numel()
    groups = layer.base_layer.groups
    a = torch.zeros(groups, r, taps, weight.shape[1] * groups, taps)
    for group in range(groups):
        for number, column in enumerate(columns.indices.tolist()):
            for tap in range(taps):
                a[group, number, tap, group * weight.shape[1] + column, tap] = 1
    a = a.reshape(groups * r * taps, weight.shape[1] * groups, *weight.shape[2:])
    return {
        "lora_A.weight": a,
        "lora_B.weight": delta.reshape(weight.shape[0], r * taps, *[1] * (weight.dim() - 2)),
    }


@pytest.mark.parametrize("kind", ["images", "words", "volume"])
def test_an_exact_lora_adapter_exists(kind, tmp_path):
    """What the conversion to LoRA needs: rank r for an embedding, groups * r * kernel positions for a convolution."""
    model, x = adapted_network(kind), example(kind)
    stock = network(kind)
    tensors, ranks = {}, {}
    for name in TARGETS:
        layer = layer_of(model, name)
        base = layer.base_layer
        if isinstance(layer, PacaConvolution) and (base.padding_mode != "zeros" or max(base.dilation) > 1):
            continue  # PEFT's LoRA convolves without either
        parts = lora_of(layer)
        ranks[name] = next(iter(parts.values())).shape[0]
        tensors |= {f"base_model.model.{name}.{key}": value for key, value in parts.items()}
    config = peft.LoraConfig(
        r=1, lora_alpha=1, target_modules=sorted(ranks), rank_pattern=ranks, alpha_pattern=dict(ranks)
    )
    lora = peft.get_peft_model(stock, config)
    result = peft.set_peft_model_state_dict(lora, tensors)
    assert not result.unexpected_keys
    for name in set(TARGETS) - set(ranks):
        model.base_model.model.get_submodule(name).enable_adapters(False)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)
    assert ranks


def test_pefts_conversion_to_lora_refuses_what_multiplies_by_no_matrix():
    """It would take an embedding's factors for a linear layer's, which no LoRA loads, and fails on kernels."""
    for kind in NETWORKS:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            peft.convert_to_lora(adapted_network(kind), rank=2)


# -- refusals --------------------------------------------------------------------------------------------------------


class ScaledEmbedding(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Conv2d(6, 6, 3, groups=6), r"^first is a depthwise convolution \(groups=6\)"),
        (lambda: nn.Conv2d(6, 12, 3, groups=6), r"^first is a depthwise convolution \(groups=6\)"),
        (
            lambda: nn.ConvTranspose2d(6, 6, 3),
            r"^first is a torch.*ConvTranspose2d, which PaCA can't adapt yet; it adapts",
        ),
        (lambda: nn.Conv2d(2, 6, 3), r"^first: r=3 columns were asked for, but this layer has 2 input columns"),
        (lambda: nn.Conv2d(6, 6, 3, groups=3), r"^first: r=3 columns were asked for, but this layer has 2 input"),
        (lambda: nn.Embedding(9, 2), r"^first: r=3 columns were asked for, but this layer has 2 input columns"),
        (lambda: nn.Embedding(9, 4, max_norm=1.0), r"^first is an embedding with max_norm=1\.0"),
        (lambda: nn.Embedding(9, 4, sparse=True), r"^first is an embedding with sparse=True"),
        (
            lambda: ScaledEmbedding(9, 4),
            r"^first is a .*ScaledEmbedding \(a subclass of Embedding, .*\), which PaCA can",
        ),
        (lambda: nn.EmbeddingBag(9, 4), r"^first is a .*EmbeddingBag, which PaCA can't adapt"),
    ],
)
def test_what_can_not_be_adapted_is_refused_by_name_and_left_alone(layer, message):
    model = nn.ModuleDict({"first": layer(), "second": nn.Linear(4, 4)})
    kinds_before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapt(model, target_modules=["second", "first"])
    assert [type(m) for m in model.modules()] == kinds_before
    assert all(p.requires_grad for p in model.parameters())


def test_a_convolution_of_one_channel_is_not_depthwise():
    model = adapt(nn.ModuleDict({"first": nn.Conv2d(1, 4, 3)}), target_modules=["first"], r=1)
    assert isinstance(layer_of(model), PacaConvolution)


# -- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators return, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            a.untyped_storage()._cdata for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


def test_a_step_of_an_embedding_allocates_nothing_of_the_weights_size():
    model = adapt(nn.ModuleDict({"first": nn.Embedding(500, 40)}), target_modules=["first"], r=3)
    layer = layer_of(model)
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    with Allocations() as seen:
        for _ in range(2):
            layer(torch.randint(0, 500, (2, 7))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 500 * 3 in seen.sizes
    assert max(seen.sizes) == 500 * 3


def test_a_step_of_a_convolution_allocates_nothing_of_the_weights_size():
    model = adapt(nn.ModuleDict({"first": nn.Conv2d(40, 50, 3)}), target_modules=["first"], r=3)
    layer = layer_of(model)
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    x = torch.randn(1, 40, 4, 4, requires_grad=True)
    with Allocations() as seen:
        for _ in range(2):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max(seen.sizes) == 50 * 3 * 9


def test_models_may_read_the_attributes_of_their_convolutions(tmp_path):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    config = WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=8)
    model = adapt(WhisperEncoder(config), r=2, target_modules=["conv1", "conv2"])
    layer = model.base_model.model.conv2
    assert (layer.stride, layer.kernel_size, layer.in_channels) == ((2,), (3,), 16)
    model(torch.randn(1, 8, 3000)).last_hidden_state.square().mean().backward()
    assert layer.paca_delta["default"].grad is not None
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_the_kind


def test_an_adapter_of_a_model_of_images_is_saved_loaded_and_swapped(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    def base():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        return ResNetForImageClassification(config).eval()

    x = torch.randn(2, 3, 32, 32)
    model = adapt(base(), r=2, target_modules=["convolution"]).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    other = adapt(base(), r=2, target_modules=["convolution"], random_seed=5).eval()
    paca.hotswap_adapter(other, tmp_path, "default")
    with torch.no_grad():
        want = model(x).logits
        assert torch.equal(again(x).logits, want)
        assert torch.equal(other(x).logits, want)
        assert not torch.equal(base()(x).logits, want)

"""Adapted layers over quantized weights: real ones that dequantize (patched), fakes that only multiply (additive)."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import paca
from models import adapt
from quantized_layers import REAL, Stack, forward_only_stack, stack
from reference import dense_weight, rounded_sum

ADDITIVE = (
    "gptqmodel.nn_modules.qlinear.torch",
    "awq.modules.linear",
    "transformers.integrations.eetq",
    "aqlm.inference",
)
KINDS = (*REAL, ADDITIVE[0])
TARGETS = ["lin1", "lin2"]


def make(kind: str, dtype: torch.dtype = torch.float32):
    if kind == "plain":
        return Stack().to(dtype)
    if kind in REAL:
        return stack(kind, dtype)
    return forward_only_stack(kind, dtype=dtype)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **settings):
    model = make(kind, dtype)
    torch.manual_seed(3)
    return adapt(model, **{"target_modules": TARGETS, **settings})


def layers(model):
    return [model.get_submodule(f"base_model.model.{name}") for name in TARGETS]


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 5)), 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def base_weight(layer) -> torch.Tensor:
    """The dequantized weight in float64, by the library's own forward pass of unit vectors where it has no other."""
    base = layer.base_layer
    if layer.mode == "patched":
        return base.quantization.dequantize(base).double()
    return base.dequantized()


def reference(model, x, adapters=("default",)):
    """Output and gradients of the sum of squares, float64, from dense weights."""
    x = x.detach().double().requires_grad_()
    h, weights = x, []
    for number, layer in enumerate(layers(model)):
        parts = [(layer.paca_delta[a], layer.paca_indices[a], layer.scaling[a]) for a in adapters]
        weight = dense_weight(base_weight(layer), parts).requires_grad_()
        weights.append(weight)
        h = h @ weight.T + layer.base_layer.bias.detach().double()
        h = torch.tanh(h) if number == 0 else h
    h.square().sum().backward()
    grads = [
        {a: layer.scaling[a] * w.grad[:, layer.paca_indices[a]] for a in adapters}
        for layer, w in zip(layers(model), weights, strict=True)
    ]
    return h.detach(), x.grad, grads


def close(found, want, dtype):
    unit = torch.finfo(dtype).eps
    assert (found.double() - want).norm() <= 8 * unit * want.norm()


@pytest.mark.parametrize("kind", [*REAL, *ADDITIVE])
def test_the_mode_follows_from_the_kind_of_layer(kind):
    assert {layer.mode for layer in layers(adapted(kind))} == {"patched" if kind in REAL else "additive"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_against_float64(kind, dtype):
    model = adapted(kind, dtype)
    x = inputs(dtype).requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    want_y, want_x, want = reference(model, x)
    close(y, want_y, dtype)
    close(x.grad, want_x, dtype)
    for layer, grads in zip(layers(model), want, strict=True):
        close(layer.paca_delta["default"].grad, grads["default"], dtype)
        assert layer.paca_delta["default"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 2), (0,)])
@pytest.mark.parametrize("kind", ["nf4", ADDITIVE[0]])
def test_inputs_of_any_shape(kind, shape):
    model = adapted(kind, r=1)
    x = torch.randn(*shape, 64, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape, 64)
    y.square().sum().backward()
    assert x.grad.shape == x.shape
    if x.numel():
        close(x.grad, reference(model, x)[1], torch.float32)


@pytest.mark.parametrize("kind", ["int8", "torchao-int4", ADDITIVE[0]])
def test_all_columns_can_be_trained(kind):
    model = adapted(kind, r=64, target_modules=["lin1"])
    layer = model.base_model.model.lin1
    assert torch.equal(layer.paca_indices["default"], torch.arange(64))
    x = inputs()
    total = dense_weight(
        base_weight(layer), [(layer.paca_delta["default"], torch.arange(64), layer.scaling["default"])]
    )
    close(layer(x), x.double() @ total.T + layer.base_layer.bias.double(), torch.float32)


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8", "hqq"])
def test_the_trained_columns_are_rounded_once(kind):
    model = adapted(kind, torch.bfloat16, r=5)
    layer = layers(model)[0]
    delta, idx, scale = layer.paca_delta["default"], layer.paca_indices["default"], layer.scaling["default"]
    base = layer.base_layer
    weight = base.patched_weight(torch.bfloat16, (layer.columns_of("default"),))
    want = rounded_sum(base_weight(layer).float(), [(delta, idx, scale)]).to(torch.bfloat16)
    assert torch.equal(weight[:, idx], want[:, idx])
    others = torch.ones(64, dtype=torch.bool).index_fill(0, idx, False)
    close(weight[:, others], base_weight(layer)[:, others], torch.bfloat16)


@contextmanager
def saved_tensors():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_selected_inputs_are_kept(kind):
    model = adapted(kind, torch.bfloat16, target_modules=["lin1"])
    layer = model.base_model.model.lin1
    x = inputs(torch.bfloat16, 40).requires_grad_()
    with saved_tensors() as kept:
        layer(x)
    parameters = {t.data_ptr() for t in [*layer.parameters(), *layer.buffers()] if t.numel()}
    new = [t for t in kept if t.data_ptr() not in parameters and t.numel() > 1]
    assert [(tuple(t.shape), t.dtype) for t in new] == [((40, 3), torch.bfloat16)]


def test_nothing_of_the_weights_size_stays_after_a_forward_pass():
    import gc

    model = adapted("nf4", torch.float32, target_modules=["lin1"])
    # By type: isinstance asks what a dead weak proxy of another test stands for.
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    y = model.base_model.model.lin1(inputs(torch.float32, 4).requires_grad_())
    sizes = [t.shape for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and id(t) not in before]
    assert y.requires_grad
    assert torch.Size((128, 64)) not in sizes


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_stock_layer_bitwise(kind):
    stock = make(kind).train()
    model = adapted(kind)
    x = inputs()
    assert not torch.equal(model(x), stock(x))
    with model.disable_adapter():
        assert torch.equal(model(x), stock(x))


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_with_shared_columns_add_up(kind):
    model = adapted(kind, indices={"lin1": [1, 5, 9], "lin2": [0, 2]})
    config = paca.PacaConfig(r=2, init_weights=False, target_modules=TARGETS, indices={"lin1": [5, 6], "lin2": [2, 7]})
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    x = inputs().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    want_y, want_x, want = reference(model, x, ("default", "second"))
    close(y, want_y, torch.float32)
    close(x.grad, want_x, torch.float32)
    for layer, grads in zip(layers(model), want, strict=True):
        for name, grad in grads.items():
            close(layer.paca_delta[name].grad, grad, torch.float32)
    model.set_adapter("second")
    close(model(x), reference(model, x, ("second",))[0], torch.float32)
    model.delete_adapter("second")
    model.set_adapter("default")
    close(model(x), reference(model, x)[0], torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = adapted(kind)
    x = inputs()
    want = model(x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(kind), tmp_path)
    assert torch.equal(again(x), want.detach())


@pytest.mark.parametrize("kind", REAL)
def test_merge_requantizes_and_unmerge_is_bitwise(kind):
    model = adapted(kind)
    x = inputs()
    want, before = model(x), [base_weight(layer) for layer in layers(model)]
    targets = [
        dense_weight(b, [(la.paca_delta["default"], la.paca_indices["default"], la.scaling["default"])])
        for la, b in zip(layers(model), before, strict=True)
    ]
    model.merge_adapter()
    for layer, base, target in zip(layers(model), before, targets, strict=True):
        merged = base_weight(layer)
        idx = layer.paca_indices["default"]
        moved = (target - base)[:, idx].norm()
        assert (merged - target)[:, idx].norm() < 0.9 * moved  # it went there, as far as the codes can tell
        assert not torch.equal(merged, base)
    model.unmerge_adapter()
    assert torch.equal(model(x), want)
    for layer, base in zip(layers(model), before, strict=True):
        assert torch.equal(base_weight(layer), base)


@pytest.mark.parametrize("kind", REAL)
def test_a_merge_on_top_has_what_was_merged_not_what_was_written_since(kind):
    model = adapted(kind)
    config = model.peft_config["default"]
    model.add_adapter("second", paca.PacaConfig(r=config.r, target_modules=config.target_modules, random_seed=7))
    with torch.no_grad():
        model.merge_adapter(["default"])
        merged = [base_weight(layer).clone() for layer in layers(model)]
        for layer in layers(model):
            layer.paca_delta["default"].add_(1.0)
        model.merge_adapter(["second"])  # whose deltas are zero
    for layer, weight in zip(layers(model), merged, strict=True):
        torch.testing.assert_close(base_weight(layer), weight)


@pytest.mark.parametrize("kind", REAL)
def test_unload_gives_the_stock_layers_back(kind):
    stock = make(kind)
    model = adapted(kind)
    x = inputs()
    want = stock.train()(x)
    unloaded = model.unload()
    assert type(unloaded.lin1) is type(stock.lin1)
    assert torch.equal(unloaded(x), want)


@pytest.mark.parametrize("kind", REAL)
def test_merge_and_unload_to_plain_layers_keeps_the_columns(kind):
    model = adapted(kind)
    marked = model.get_base_model()
    marked.is_quantized = marked.is_loaded_in_4bit = True  # as by accelerate, without a quantizer of transformers
    x = inputs()
    want = reference(model, x)[0]
    plain = model.merge_and_unload(dequantize=True)
    assert not {"is_quantized", "is_loaded_in_4bit"} & vars(plain).keys()
    assert type(plain.lin1) is type(plain.lin2) is torch.nn.Linear
    close(plain(x), want, torch.float32)
    assert {type(p) for p in plain.parameters()} == {torch.nn.Parameter}


@pytest.mark.parametrize("kind", ADDITIVE)
def test_merging_into_a_weight_that_cannot_be_written_is_refused(kind):
    model = adapted(kind)
    x = inputs()
    want = model(x)
    with pytest.raises(ValueError, match=r"'default' can't be merged: a .*QuantLinear can't give its weight as floats"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="can't be merged"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(model(x), want)
    unloaded = model.unload()
    assert torch.equal(unloaded(x), make(kind)(x))


@pytest.mark.parametrize("kind", REAL)
def test_a_model_that_was_loaded_under_inference_mode_trains(kind):
    with torch.inference_mode():
        model = make(kind)
    assert next(p for p in model.parameters()).is_inference()
    torch.manual_seed(3)
    model, other, x = adapt(model, target_modules=TARGETS), adapted(kind), inputs()
    y, expected = model(x), other(x)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    for layer, twin in zip(layers(model), layers(other), strict=True):
        assert torch.equal(layer.paca_delta["default"].grad, twin.paca_delta["default"].grad)


@pytest.mark.parametrize("kind", REAL)
def test_a_model_infers_under_inference_mode(kind):
    model, x = adapted(kind), inputs()
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", REAL)
def test_copies_and_pickles_compute_the_same(kind, pickled):
    if pickled and kind.startswith("torchao"):
        pytest.skip("torchao's own layers can't be pickled: quantize_ puts a partial on them as extra_repr")
    model = adapted(kind)
    x = inputs()
    again = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        layers(again)[0].paca_delta["default"].zero_()
    assert not torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_a_copy_of_an_unpickled_model_merges(kind):
    model = adapted(kind)
    again = copy.deepcopy(pickle.loads(pickle.dumps(model)))  # bitsandbytes' class of weights is lost on the way
    for one in (model, again):
        one.merge_adapter()
    assert torch.equal(again(inputs()), model(inputs()))
    for one in (model, again):
        one.unmerge_adapter()
    assert torch.equal(again(inputs()), model(inputs()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noticed", ["refresh", "eval", "backward"])
def test_what_no_version_counter_shows_is_seen_as_with_plain_weights(kind, noticed):
    model = adapted(kind)
    x = inputs()
    before = model(x)
    before.sum().backward()  # no optimizer is known: the next pass with gradients looks again
    layers(model)[0].paca_delta["default"].data.zero_()
    if noticed == "refresh":
        paca.refresh(model)
    elif noticed == "eval":
        model.eval()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("kind", [*REAL, "gptqmodel"])
def test_a_step_of_ones_own_is_seen_after_a_pass_without_gradients(kind):
    model, x = adapted(kind), inputs()
    model(x).square().mean().backward()
    with torch.no_grad():
        model(x)  # a metric, before the step
        for layer in layers(model):
            layer.paca_delta["default"].data.sub_(1.0)
        found = model(x)
        paca.refresh(model)
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_after_the_first_dequantizes_and_copies_the_columns_alone(kind):
    model = adapted(kind)
    x = inputs()
    deltas = [layer.paca_delta["default"] for layer in layers(model)]
    optimizer = torch.optim.SGD(deltas, lr=0.5)
    for _ in range(2):
        model(x).square().sum().backward()
        kept = [getattr(layer.base_layer, "_columns_kept", None) for layer in layers(model)]
        optimizer.step()
        model(x)
        for layer, delta, old in zip(layers(model), deltas, kept, strict=True):
            if layer.mode == "patched":
                now = layer.base_layer._columns_kept
                assert now.originals is old.originals
                wanted = now.originals.values.float() + layer.scaling["default"] * delta.detach()
                assert torch.equal(now.columns, wanted.to(now.columns.dtype))
                assert not torch.equal(now.columns, old.columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(kind, reentrant):
    model, x = adapted(kind), inputs().requires_grad_()
    model(x).square().sum().backward()
    want = [layer.paca_delta["default"].grad for layer in layers(model)]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for layer, grad in zip(layers(model), want, strict=True):
        assert torch.equal(layer.paca_delta["default"].grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", ADDITIVE[0]])
def test_checkpointing_that_recomputes_with_another_adapter_raises(kind, reentrant):
    model = adapted(kind)
    model.add_adapter("second", paca.PacaConfig(r=3, init_weights=False, target_modules=TARGETS))
    loss = checkpoint(model, inputs().requires_grad_(), use_reentrant=reentrant).sum()
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="repeats a forward pass"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fp4", "torchao-int8", ADDITIVE[0]])
def test_a_backward_pass_uses_the_columns_of_its_forward_pass(kind):
    model, x = adapted(kind), inputs().requires_grad_()
    loss = model(x).square().sum()
    with model.disable_adapter():
        model(x)
    loss.backward()
    close(x.grad, reference(model, x)[1], torch.float32)


@pytest.mark.parametrize("kind", ["nf4", ADDITIVE[0]])
def test_a_delta_that_is_changed_before_the_backward_pass_raises(kind):
    model = adapted(kind)
    loss = model(inputs().requires_grad_()).sum()
    with torch.no_grad():
        layers(model)[1].paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match=r"modified (between forward and backward|by an inplace)"):
        loss.backward()


@pytest.mark.parametrize("names", [None, ["default", "__base__", "default"]])
@pytest.mark.parametrize(
    "how", ["own step", "own step, no pass", "roll, refresh", "write, refresh", "write, no grad", "nothing"]
)
@pytest.mark.parametrize("kind", ["plain", "nf4", "torchao-int8", ADDITIVE[0]])
def test_a_write_that_no_counter_shows_between_two_pending_losses_raises(kind, how, names):
    model = adapted(kind).eval()  # PEFT's condition for several adapters in a batch
    deltas = [layer.paca_delta["default"] for layer in layers(model)]

    def loss():
        return model(inputs(), **({} if names is None else {"adapter_names": names})).square().sum()

    first, second, reference = loss(), loss(), loss()
    reference.backward()
    wanted = [delta.grad.clone() for delta in deltas]
    model.zero_grad()
    first.backward()
    for delta in deltas if how != "nothing" else ():
        delta.data.copy_(delta.roll(1, 0) if "roll" in how else delta - 0.1 * wanted[0].norm())
    model.zero_grad()
    if "refresh" in how:
        paca.refresh(model)
    with torch.set_grad_enabled("no grad" not in how):
        if "no pass" not in how:
            loss()
    if how == "nothing" or ("no pass" in how and kind != ADDITIVE[0] and names is None):  # the columns are still there
        second.backward()
        for delta, gradient in zip(deltas, wanted, strict=True):
            close(delta.grad, gradient.double(), torch.float32)
    else:
        with pytest.raises(RuntimeError, match="modified between forward and backward"):
            second.backward()


@pytest.mark.parametrize("kind", REAL)
def test_a_merge_between_forward_and_backward_raises(kind):
    model = adapted(kind)
    loss = model(inputs().requires_grad_()).sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged, unmerged or loaded"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, x = adapted(kind), inputs().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    want_y, want_x, want = reference(model, x)
    close(y, want_y, torch.bfloat16)
    close(x.grad, want_x, torch.bfloat16)
    for layer, grads in zip(layers(model), want, strict=True):
        close(layer.paca_delta["default"].grad, grads["default"], torch.bfloat16)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8", ADDITIVE[0]])
def test_hooks_on_the_base_layer_run(kind):
    model = adapted(kind)
    seen = []
    layers(model)[0].base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(inputs())
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["nf4", ADDITIVE[0]])
def test_training_lowers_the_loss(kind):
    model, x = adapted(kind, init_weights=True, r=16), inputs()
    goal = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_layer_without_gradients_for_its_input_is_noticed():
    model = adapt(forward_only_stack(ADDITIVE[0], trainable=False), target_modules=TARGETS)
    with pytest.raises(RuntimeError, match="gives no gradient with respect to its input"):
        model(inputs().requires_grad_())
    with torch.no_grad():
        model(inputs())


def test_a_quantized_type_that_nobody_knows_says_what_and_why():
    model = forward_only_stack("someones.quantizer")
    with pytest.raises(ValueError, match=r"lin1 is a someones.quantizer.QuantLinear, which PaCA can't.*gptqmodel"):
        adapt(model, target_modules=["lin1"])


def test_a_format_of_torchao_that_is_not_known_is_named():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows")
    model = stack("torchao-int8")
    model.lin1 = torch.nn.Linear(64, 128, dtype=torch.bfloat16)
    weight = nf4.to_nf4(model.lin1.weight.data, 32, 2)
    model.lin1.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"torchao's NF4Tensor is not one of the formats that paca knows"):
        adapt(model, target_modules=["lin1"])


def test_int8_layers_that_keep_16_bit_weights_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = stack("int8")
    model.lin1 = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=True)
    with pytest.raises(ValueError, match=r"lin1 is a Linear8bitLt of bitsandbytes, but it keeps 16-bit weights"):
        adapt(model, target_modules=["lin1"])


def test_a_rank_above_in_features_leaves_the_model_as_it_was():
    model = stack("nf4")
    stock = type(model.lin1)
    with pytest.raises(ValueError, match="r=65 columns"):
        adapt(model, target_modules=TARGETS, r=65)
    assert type(model.lin1) is stock


def test_torch_compile_runs_the_layer_outside_the_graph():
    model, x = adapted("nf4"), inputs()
    compiled = torch.compile(model.get_base_model(), backend="eager")
    assert torch.equal(compiled(x), model(x))
    with torch.no_grad():
        layers(model)[0].paca_delta["default"].add_(1)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "dequantize", "beside a merged one"])
@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_safe_merge_finds_sums_that_are_not_finite(kind, call):
    model, x = adapted(kind, torch.float16), inputs(torch.float16)
    model.add_adapter("good", paca.PacaConfig(r=3, init_weights=False, random_seed=1, target_modules=TARGETS))
    if call == "beside a merged one":
        model.merge_adapter(["good"])
    with torch.no_grad():
        merged = model(x)
        layers(model)[1].paca_delta["default"].fill_(1e5)  # finite in float32; float16 ends at 65504
        want = merged if call == "beside a merged one" else model(x)
    merge = model.merge_adapter if call in ("merge_adapter", "beside a merged one") else model.merge_and_unload
    settings = {"dequantize": True} if call == "dequantize" else {}
    with pytest.raises(ValueError, match="would put NaN or Inf into the weight, so nothing was merged"):
        merge(adapter_names=["default"], safe_merge=True, **settings)
    assert [layer.merged_adapters for layer in layers(model)] == [["good"] if "beside" in call else []] * 2
    with torch.no_grad():
        assert torch.equal(model(x), want) or bool(want.isnan().any())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "dequantize"])
@pytest.mark.parametrize("how", ["in place", "data"])
@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_merge_has_the_deltas_that_were_written_since_the_last_pass(kind, how, call):
    settings = {"dequantize": True} if call == "dequantize" else {}
    outputs = []
    for passed_before in (True, False):
        model, x = adapted(kind), inputs()
        if passed_before:
            model(x).sum().backward()
            model.zero_grad()
        with torch.no_grad():
            for layer in layers(model):
                delta = layer.paca_delta["default"]
                (delta.data if how == "data" else delta).copy_(torch.full_like(delta, 0.5))
            if call == "merge_adapter":
                model.merge_adapter()
                outputs.append(model(x))
            else:
                outputs.append(model.merge_and_unload(**settings)(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("change", ["none", "switch", "scale", "write", "step", "there and back"])
@pytest.mark.parametrize("kind", ["plain", "nf4", "torchao-int8", ADDITIVE[0]])
def test_checkpointing_sees_what_changed_in_a_frozen_layer(kind, change):
    base = make(kind)
    model = peft.get_peft_model(base, paca.PacaConfig(r=8, target_modules=["lin1"], init_weights=False), "old")
    model.add_adapter("new", paca.PacaConfig(r=8, target_modules=["lin2"], init_weights=False))

    def both():
        model.base_model.set_adapter(["old", "new"])
        model.set_requires_grad("old", requires_grad=False)

    both()
    below, above = layers(model)
    x, inner = inputs(), model.base_model.model
    run = lambda: checkpoint(inner, x, use_reentrant=False).square().sum()  # noqa: E731
    run().backward()
    want = above.paca_delta["new"].grad.clone()
    model.zero_grad()
    loss = run()
    if change in ("switch", "there and back"):
        model.base_model.set_adapter("new")
    if change == "there and back":
        both()
    if change == "scale":
        below.set_scale("old", -3.0)
    if change == "write":
        with torch.no_grad():
            below.paca_delta["old"].mul_(2)
    if change == "step":
        old = below.paca_delta["old"]
        old.grad = torch.ones_like(old)
        torch.optim.SGD([old], lr=1.0).step()
    if change in ("none", "there and back"):
        loss.backward()
        assert torch.equal(above.paca_delta["new"].grad, want)
    else:
        with pytest.raises(RuntimeError, match="Activation checkpointing repeats"):
            loss.backward()


def test_scales_that_change_with_each_pass_over_a_frozen_layer_are_not_kept_for_ever():
    model = adapted("plain")
    for layer in layers(model):
        layer.paca_delta["default"].requires_grad_(False)
    for number in range(100):
        layers(model)[0].set_scale("default", float(number))
        checkpoint(model, inputs(), use_reentrant=False)
    assert len(layers(model)[0].base_layer.columns.checkpointed_passes) <= 64


def test_a_quantized_weight_that_is_replaced_by_data_has_its_own_columns():
    """No version counter shows it: the columns of the old weight were written into the new one."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(5)
    model, other, x = adapted("nf4", init_weights=False), adapted("nf4", init_weights=False), inputs()
    model(x)
    torch.manual_seed(6)
    fresh = make("nf4")
    with model.disable_adapter(), other.disable_adapter():
        for one in (model, other):
            for name in TARGETS:
                base, new = one.get_submodule(f"base_model.model.{name}").base_layer, fresh.get_submodule(name)
                base.weight.data = new.weight.data.clone()
                base.weight.quant_state = base.quant_state = new.weight.quant_state
    assert torch.equal(model(x), other(x))  # which had kept nothing of the old one

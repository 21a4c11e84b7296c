"""The invariants of design section 3, on adapted layers within a model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils.checkpoint import checkpoint

import paca
from models import adapt, adapted_perceptron, base_state, gpt2, llama, perceptron, tokens
from paca.layers import PacaLinear
from reference import dense_weight, tolerance

KINDS = ["linear", "conv1d"]


def layer_of(model, name="lin1") -> PacaLinear:
    return model.base_model.model.get_submodule(name)


def second_adapter(model, **settings):
    model.add_adapter(
        "second",
        paca.PacaConfig(
            **{"r": 2, "init_weights": False, "random_seed": 7, "target_modules": ["lin1", "lin2"], **settings}
        ),
    )


def reference_step(model, x):
    """Loss and gradients of the deltas, from the dense weights as W holds them, in float64, by plain autograd."""
    values = {}
    h = x.double()
    grads = []
    for name in ("lin1", "lin2"):
        layer = layer_of(model, name)
        base = layer.base_layer
        weight = base.weight.detach() if base.input_dim == 1 else base.weight.detach().t()
        values[name] = weight.double().clone().requires_grad_()
        h = h @ values[name].T + base.bias.detach().double()
        h = torch.tanh(h) if name == "lin1" else h
    loss = h.square().sum()
    loss.backward()
    for name in ("lin1", "lin2"):
        layer = layer_of(model, name)
        for adapter in layer.active_adapters:
            grads.append(layer.scaling[adapter] * values[name].grad[:, layer.paca_indices[adapter]])
    return loss.detach(), grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
def test_loss_and_gradients_agree_with_the_float64_reference(kind, dtype, several):
    model = adapted_perceptron(kind, dtype)
    if several:
        second_adapter(model)
        model.base_model.set_adapter(["default", "second"])
    x = torch.randn(6, 7, dtype=dtype)
    loss = model(x).square().sum()
    loss.backward()
    want_loss, want = reference_step(model, x)
    bound = tolerance(dtype, 13)
    torch.testing.assert_close(loss.double(), want_loss, rtol=30 * bound["rtol"], atol=30 * bound["atol"])
    got = [
        layer_of(model, n).paca_delta[a].grad.double()
        for n in ("lin1", "lin2")
        for a in layer_of(model, n).active_adapters
    ]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=30 * bound["rtol"], atol=30 * bound["atol"] * float(w.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_leaves_outputs_and_input_gradients_bitwise_as_they_were(kind):
    model = perceptron(kind)
    model.requires_grad_(False)
    x = torch.randn(2, 4, 7, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    gx, x.grad = x.grad, None
    adapted = adapt(model, target_modules=["lin1", "lin2"], init_weights=True)
    y2 = adapted(x)
    y2.square().sum().backward()
    assert torch.equal(y, y2)
    assert torch.equal(gx, x.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "data_writes", "foreach_sgd"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_follows_a_dense_float64_run(kind, optimizer, accumulation):
    """Three optimizers (one writes behind version counters), against weights rebuilt at every forward."""
    model = adapted_perceptron(kind, torch.float64)
    originals = base_state(model)
    deltas = [p for p in model.parameters() if p.requires_grad]
    shadow = [p.detach().clone().requires_grad_() for p in deltas]

    def make_optimizer(parameters):
        if optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=0.02)
        if optimizer == "foreach_sgd":
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=True)
        return None

    def step(instance, parameters):
        if instance is not None:
            instance.step()
        else:
            for p in parameters:
                p.data.sub_(0.05 * p.grad)
        for p in parameters:
            p.grad = None

    def shadow_forward(x):
        h = x
        for number, name in enumerate(("lin1", "lin2")):
            layer = layer_of(model, name)
            weight = originals[f"{name}.weight"]
            weight = weight if layer.base_layer.input_dim == 1 else weight.T
            scattered = torch.zeros_like(weight).index_copy(1, layer.paca_indices["default"], shadow[number])
            h = h @ (weight + layer.scaling["default"] * scattered).T + originals[f"{name}.bias"]
            h = torch.tanh(h) if name == "lin1" else h
        return h

    mine, theirs = make_optimizer(deltas), make_optimizer(shadow)
    for _ in range(4):
        for _ in range(accumulation):
            x = torch.randn(5, 7, dtype=torch.float64)
            loss, shadow_loss = model(x).square().mean(), shadow_forward(x).square().mean()
            torch.testing.assert_close(loss, shadow_loss, rtol=1e-12, atol=1e-12)
            loss.backward()
            shadow_loss.backward()
        step(mine, deltas)
        step(theirs, shadow)
    for p, q in zip(deltas, shadow, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


def test_disabling_the_adapter_gives_the_base_model_bitwise():
    model = perceptron()
    x = torch.randn(3, 7)
    want = model(x)
    adapted = adapt(model, target_modules=["lin1", "lin2"])
    assert not torch.equal(adapted(x), want)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), want)
    assert not torch.equal(adapted(x), want)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reference_grad", [False, True])
def test_a_reference_pass_under_disable_adapter_does_not_disturb_the_backward_pass(reference_grad):
    """DPO: policy, reference under disable_adapter, backward of the policy, with no forward in between."""
    model = adapted_perceptron()
    x = torch.randn(4, 7, requires_grad=True)
    model(x).square().sum().backward()
    want, want_x = gradients(model), x.grad.clone()
    model.zero_grad()
    x.grad = None
    policy = model(x).square().sum()
    with torch.set_grad_enabled(reference_grad), model.disable_adapter():
        reference = model(x).square().sum()
    policy.backward()
    for g, w in zip(gradients(model), want, strict=True):
        assert (g is None and w is None) or torch.equal(g, w)
    assert torch.equal(x.grad, want_x)
    if reference_grad:  # and a gradient through the base model sees the base model's weights
        x.grad = None
        reference.backward()
        got = x.grad.clone()
        x.grad = None
        plain = perceptron().requires_grad_(False)
        plain(x).square().sum().backward()
        assert torch.equal(got, x.grad)


def test_two_adapters_may_run_before_one_backward_pass():
    model = adapted_perceptron()
    second_adapter(model)
    x = torch.randn(4, 7, requires_grad=True)
    want, want_x = {}, torch.zeros_like(x)
    for name in ("default", "second"):
        model.set_adapter(name)
        x.grad = None
        model(x).square().sum().backward()
        want_x += x.grad
        want[name] = [layer_of(model, n).paca_delta[name].grad.clone() for n in ("lin1", "lin2")]
    model.zero_grad()
    x.grad = None
    losses = []
    for name in ("default", "second"):
        model.set_adapter(name)
        losses.append(model(x).square().sum())
    for n in ("lin1", "lin2"):  # set_adapter has frozen the first one again
        layer_of(model, n).paca_delta["default"].requires_grad_()
    sum(losses).backward()
    for name, grads in want.items():
        for n, g in zip(("lin1", "lin2"), grads, strict=True):
            assert torch.equal(layer_of(model, n).paca_delta[name].grad, g)
    torch.testing.assert_close(x.grad, want_x)


def test_a_step_between_forward_and_backward_raises():
    model = adapted_perceptron()
    loss = model(torch.randn(4, 7)).sum()
    with torch.no_grad():
        layer_of(model).paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match="modified between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradient_checkpointing_changes_nothing_bitwise(make, use_reentrant):
    def run(checkpointing):
        model = adapt(make(), task_type="CAUSAL_LM")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for step in range(3):
            for half in range(2):
                ids = tokens(seed=2 * step + half)
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses), [p.detach() for p in model.parameters() if p.requires_grad]

    plain, checkpointed = run(False), run(True)
    assert torch.equal(plain[0], checkpointed[0])
    for p, q in zip(plain[1], checkpointed[1], strict=True):
        assert torch.equal(p, q)


def test_checkpointing_that_recomputes_with_another_adapter_raises():
    model = adapted_perceptron()
    second_adapter(model, r=3)
    loss = checkpoint(model, torch.randn(4, 7), use_reentrant=False).sum()
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="adapter 'second' active, but it first ran with other"):
        loss.backward()


def test_checkpointing_with_a_reference_pass_in_between_is_right():
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    model(x).square().sum().backward()
    want = gradients(model)
    model.zero_grad()
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    for g, w in zip(gradients(model), want, strict=True):
        assert (g is None and w is None) or torch.equal(g, w)


# -- the base weight as others see it --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_the_pretrained_columns_and_goes_on_holding_them(kind):
    model = perceptron(kind)
    want = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = adapt(model, target_modules=["lin1", "lin2"])
    x = torch.randn(3, 7)
    y = adapted(x)
    whole = adapted.state_dict()
    layer = layer_of(adapted).base_layer.state_dict()
    assert torch.equal(adapted(x), y)
    for state, name in ((whole, "base_model.model.lin1.base_layer.weight"), (layer, "weight")):
        assert torch.equal(state[name], want["lin1.weight"])
    assert not torch.equal(layer_of(adapted).base_layer.weight, want["lin1.weight"])


def test_a_state_dict_goes_on_holding_the_pretrained_weight_when_an_older_user_of_it_is_gone():
    adapted = adapted_perceptron(init_weights=False)
    view = layer_of(adapted).base_layer.weight.data
    state = adapted.state_dict()
    shown = {k: v.clone() for k, v in state.items()}
    del view
    adapted(torch.randn(3, 7))
    assert all(torch.equal(state[k], v) for k, v in shown.items())


def test_taking_a_state_dict_does_not_disturb_training():
    def run(take):
        model = adapted_perceptron()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(4):
            loss = model(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().sum()
            if take:
                model.state_dict()
            loss.backward()
            if take:
                kept = model.state_dict()
            optimizer.step()
            optimizer.zero_grad()
        if take:
            del kept
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    for p, q in zip(run(False), run(True), strict=True):
        assert torch.equal(p, q)


def test_loading_a_base_state_dict_replaces_what_is_beneath_the_columns():
    model = adapted_perceptron()
    x = torch.randn(3, 7)
    model(x)
    other = perceptron(seed=5)
    from peft.utils.save_and_load import set_base_model_state_dict

    set_base_model_state_dict(model, other.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(x), other(x))
    layer = layer_of(model)
    model(x)
    columns = layer.columns_of("default")
    want = dense_weight(other.lin1.weight, [(columns.delta, columns.indices, columns.scale)]).float()
    assert torch.equal(layer.base_layer.weight, want)


def test_loading_another_base_weight_while_columns_are_resident():
    model = adapted_perceptron()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    name = "base_model.model.lin1.base_layer.weight"
    state[name] = state[name] + 1
    x = torch.randn(3, 7)
    model(x)
    model.load_state_dict(state)
    model(x)
    layer = layer_of(model)
    columns = layer.columns_of("default")
    want = dense_weight(state[name], [(columns.delta, columns.indices, columns.scale)]).float()
    assert torch.equal(layer.base_layer.weight, want)
    assert torch.equal(base_state(model)["lin1.weight"], state[name])


def test_loading_a_base_weight_between_forward_and_backward_raises():
    model = adapted_perceptron()
    loss = model(torch.randn(3, 7)).sum()
    layer = layer_of(model).base_layer
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="merged, unmerged or loaded"):
        loss.backward()


def test_loading_a_state_dict_taken_earlier_restores_everything():
    model = adapted_perceptron()
    x = torch.randn(3, 7)
    y = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        layer_of(model).paca_delta["default"].add_(1)
    assert not torch.equal(model(x), y)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)


def test_loading_the_models_own_state_dict_while_adapted_keeps_the_base():
    model = adapted_perceptron()
    originals = base_state(model)
    x = torch.randn(3, 7)
    y = model(x)
    state = model.state_dict()  # shares storage with the model
    model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


def test_a_weight_can_not_be_loaded_under_a_merge():
    model = adapted_perceptron()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge first"):
        model.load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch_save"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_hold_the_pretrained_weight_and_work_on(how, kind):
    model = adapted_perceptron(kind)
    second_adapter(model)
    originals = base_state(model)
    x = torch.randn(3, 7)
    y = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(layer_of(twin).base_layer.weight, layer_of(model).base_layer.weight) is False  # that is parked
    assert torch.equal(layer_of(model).base_layer.weight, originals["lin1.weight"])
    assert torch.equal(twin(x), y)
    assert torch.equal(model(x), y)
    assert torch.equal(base_state(twin)["lin1.weight"], originals["lin1.weight"])
    twin(x).sum().backward()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "base_layer.weight" not in name:
                p.add_(0.1)
    assert torch.equal(model(x), y)  # nothing is shared
    twin.set_adapter("second")
    twin(x)
    loaded = base_state(twin)
    assert torch.equal(loaded["lin1.weight"], originals["lin1.weight"])


@pytest.mark.parametrize("alive", [False, True])
def test_a_shallow_copy_of_a_layer_leaves_it_its_steps(alive):
    model, x = adapted_perceptron(), torch.randn(4, 7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, lr=0.1)
    twin = copy.copy(layer_of(model))
    for _ in range(2):
        if not alive:
            twin = None
            gc.collect()
        model(x).square().sum().backward()
        optimizer.step()
        alive = False
    weight = layer_of(model).base_layer.weight.clone()
    paca.refresh(model)
    assert torch.equal(layer_of(model).base_layer.weight, weight)
    assert twin is None


def test_a_merge_on_top_adds_its_own_columns_alone():
    model = adapted_perceptron()
    second_adapter(model, r=3)
    before = base_state(model)
    model.merge_adapter(["default"])
    merged = layer_of(model).base_layer.weight.clone()
    with torch.no_grad():
        layer_of(model).paca_delta["default"].add_(1.0)
        layer_of(model).paca_delta["second"].zero_()
    model.merge_adapter(["second"])
    assert torch.equal(layer_of(model).base_layer.weight, merged)
    model.unmerge_adapter()
    after = base_state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_copy_while_merged_can_be_unmerged():
    model = adapted_perceptron()
    originals = base_state(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    for name, value in base_state(twin).items():
        assert torch.equal(value, originals[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_dtype_goes_through_the_pretrained_weight(dtype):
    model = adapted_perceptron()
    originals = base_state(model)
    model(torch.randn(3, 7))
    model.to(dtype)
    layer = layer_of(model)
    model(torch.randn(3, 7, dtype=dtype))
    columns = layer.columns_of("default")
    want = dense_weight(originals["lin1.weight"].to(dtype), [(columns.delta, columns.indices, columns.scale)]).to(dtype)
    torch.testing.assert_close(layer.base_layer.weight, want, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
    with model.disable_adapter():
        model(torch.randn(3, 7, dtype=dtype))
        assert torch.equal(layer.base_layer.weight, originals["lin1.weight"].to(dtype))


def test_moving_to_another_device_parks_first():
    model = adapted_perceptron()
    model(torch.randn(3, 7))
    moved = model.to("meta")
    assert layer_of(moved).base_layer.weight.is_meta
    assert layer_of(moved).paca_indices["default"].is_meta
    assert not layer_of(moved).base_layer.columns.state.columns


# -- hooks, threads, modes -------------------------------------------------------------------------------------------


def test_hooks_on_the_layer_and_on_its_base_layer_run_and_may_change_things():
    model = adapted_perceptron(dtype=torch.float64)
    layer = layer_of(model)
    calls = []
    layer.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    layer.register_forward_hook(lambda m, a, y: calls.append("post"))
    layer.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    layer.base_layer.register_forward_pre_hook(lambda m, a: (calls.append("base pre"), (2 * a[0],))[1])
    layer.base_layer.register_forward_hook(lambda m, a, y: (calls.append("base post"), 3 * y)[1])
    layer.base_layer.register_full_backward_hook(lambda m, gi, go: calls.append("base backward"))
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    model.base_model.model.lin1(x).sum().backward()
    assert calls == ["pre", "base pre", "base post", "post", "base backward", "backward"]
    want = layer.scaling["default"] * torch.full((13, 4), 3.0, dtype=torch.float64) @ (2 * x.detach())
    torch.testing.assert_close(layer.paca_delta["default"].grad, want[:, layer.paca_indices["default"]])


def test_inference_from_several_threads_is_read_only_and_right():
    model = adapted_perceptron()
    model.eval()
    xs = [torch.randn(50, 7) for _ in range(16)]
    with torch.no_grad():
        want = [model(x) for x in xs]
        version = layer_of(model).base_layer.weight._version
        got = [None] * len(xs)

        def work(number):
            with torch.no_grad():
                for _ in range(20):
                    got[number] = model(xs[number])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(xs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    assert layer_of(model).base_layer.weight._version == version


def test_a_first_pass_in_inference_mode_leaves_the_model_trainable():
    model = adapted_perceptron()
    x = torch.randn(3, 7)
    with torch.inference_mode():
        y = model(x).clone()
    model(x).sum().backward()
    assert torch.equal(model(x).detach(), y)
    with torch.inference_mode():
        layer_of(model).paca_delta["default"].data.add_(1)
    paca.refresh(model)
    assert not torch.equal(model(x).detach(), y)


def test_refresh_brings_in_a_data_write_that_nobody_can_see():
    model = adapted_perceptron()
    x = torch.randn(3, 7)
    with torch.no_grad():
        y = model(x)
        layer_of(model).paca_delta["default"].data.zero_()
        layer_of(model, "lin2").paca_delta["default"].data.zero_()
        paca.refresh(model)
        assert not torch.equal(model(x), y)
        assert torch.equal(model(x), perceptron()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_stays_close_to_float32(dtype):
    def losses(autocast):
        model = adapted_perceptron()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        out = []
        for step in range(10):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out.append(loss.item())
        return torch.tensor(out)

    plain = losses(False)
    torch.testing.assert_close(losses(True), plain, rtol=0.02, atol=0.02)
    assert plain[-1] < plain[0]


def test_a_layer_that_the_model_looked_after_but_did_not_run_still_sees_data_writes():
    model = adapted_perceptron()
    layer = layer_of(model)
    x = torch.randn(3, 7)
    loss = layer(x).sum()
    with torch.no_grad():
        for hook in model.base_model.model._forward_pre_hooks.values():
            hook(model, ())  # as before a forward pass that leaves this layer out
        for hook in model.base_model.model._forward_hooks.values():
            hook(model, (), None)
    loss.backward()
    layer.paca_delta["default"].data.add_(1)
    layer.paca_delta["default"].grad = None
    columns = layer.columns_of("default")
    layer(x)
    original = perceptron().lin1.weight
    want = dense_weight(original, [(columns.delta, columns.indices, columns.scale)]).float()
    assert torch.equal(layer.base_layer.weight, want)


def test_the_scale_of_an_adapter_can_be_changed():
    model = adapted_perceptron()
    layer = layer_of(model)
    x = torch.randn(3, 7)
    with torch.no_grad():
        y = layer(x)
        base = nn.functional.linear(x, layer.base_layer.state_dict()["weight"], layer.base_layer.bias)
        layer.scale_layer(2.0)
        torch.testing.assert_close(layer(x) - base, 2 * (y - base))
        layer.unscale_layer(2.0)
        assert torch.equal(layer(x), y)
        layer.set_scale("default", 0.5)
        torch.testing.assert_close(layer(x) - base, (y - base) / 2)
        layer.unscale_layer()
        assert torch.equal(layer(x), y)


def test_pefts_switch_of_input_casts_changes_nothing():
    """diffusers' layerwise casting runs every adapted layer within it."""
    model = adapted_perceptron()
    x = torch.randn(3, 7)
    y = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), y)


# -- what would bypass the columns -----------------------------------------------------------------------------------


def test_a_layer_with_accelerates_hook_is_trained():
    model = perceptron()
    add_hook_to_module(model.lin1, AlignDevicesHook(execution_device="cpu"))
    want = adapted_perceptron(target_modules=["lin1"])
    torch.manual_seed(1)
    layer_of(want).paca_delta["default"].data.normal_()
    model = adapt(model, target_modules=["lin1"])
    layer_of(model).paca_delta["default"].data.copy_(layer_of(want).paca_delta["default"])
    x = torch.randn(4, 7)
    for each in (want, model):
        each(x).square().sum().backward()
    assert torch.equal(layer_of(model).paca_delta["default"].grad, layer_of(want).paca_delta["default"].grad)
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), want(x))


@pytest.mark.parametrize("taken_off", [False, True])
def test_a_hook_that_is_put_on_later_does_not_outlive_the_adapter(taken_off):
    model = adapted_perceptron()
    add_hook_to_module(layer_of(model).base_layer, AlignDevicesHook(execution_device="cpu"))
    if taken_off:
        remove_hook_from_module(layer_of(model).base_layer)
    x = torch.randn(4, 7)
    want = model(x)
    assert torch.equal(model.merge_and_unload()(x), want)


def test_a_layer_that_would_bypass_the_columns_is_refused():
    model = perceptron()
    stock = model.lin1.forward
    model.lin1.forward = lambda x: stock(x)
    with pytest.raises(ValueError, match=r"^lin1 has a forward of its own"):
        adapt(model, target_modules=["lin1"])
    assert type(model.lin1) is nn.Linear


@pytest.mark.parametrize("change", ["switch", "step"])
def test_reentrant_checkpointing_that_recomputes_something_else_raises(change):
    model = adapted_perceptron()
    second_adapter(model, r=3)
    loss = checkpoint(model, torch.randn(4, 7, requires_grad=True), use_reentrant=True).sum()
    if change == "switch":
        model.set_adapter("second")
    else:
        with torch.no_grad():
            layer_of(model).paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match="first ran with other adapters or other values"):
        loss.backward()


class Repeated(torch.autograd.Function):
    """Re-entrant checkpointing as somebody may write it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


@pytest.mark.parametrize("change", ["nothing", "switch", "step"])
def test_a_pass_that_somebodys_own_function_repeats_is_checked(change):
    model = adapted_perceptron()
    second_adapter(model, r=3)
    x = torch.randn(4, 7, requires_grad=True)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    loss = Repeated.apply(model, x).square().sum()
    if change == "nothing":
        loss.backward()
        torch.testing.assert_close(x.grad, want)
        return
    if change == "switch":
        model.set_adapter("second")
    else:
        with torch.no_grad():
            layer_of(model).paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match="first ran with other adapters or other values"):
        loss.backward()


def test_reentrant_checkpointing_forgets_what_ran_in_earlier_steps():
    model = adapted_perceptron()
    second_adapter(model, r=3)
    model.set_adapter("second")
    model(torch.randn(4, 7)).sum().backward()
    model.set_adapter("default")
    loss = checkpoint(model, torch.randn(4, 7, requires_grad=True), use_reentrant=True).sum()
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="first ran with other adapters or other values"):
        loss.backward()


def test_reentrant_checkpointing_with_a_reference_pass_in_between_is_right():
    model = adapted_perceptron()
    x = torch.randn(4, 7, requires_grad=True)
    model(x).square().sum().backward()
    want = gradients(model)
    model.zero_grad()
    loss = checkpoint(model, x, use_reentrant=True).square().sum()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    loss.backward()
    for g, w in zip(gradients(model), want, strict=True):
        assert (g is None and w is None) or torch.equal(g, w)


def test_switching_off_and_deleting_park_at_once():
    model = adapted_perceptron()
    original = perceptron().lin1.weight
    x = torch.randn(4, 7)
    model(x)
    assert not torch.equal(layer_of(model).weight, original)
    with model.disable_adapter():
        assert torch.equal(layer_of(model).weight, original)
    model(x)
    second_adapter(model)
    model.set_adapter("second")
    second = layer_of(model).paca_indices["second"]
    untouched = torch.ones(7, dtype=torch.bool).index_fill_(0, second, False)
    assert torch.equal(layer_of(model).weight[:, untouched], original[:, untouched])
    assert not torch.equal(layer_of(model).weight[:, second], original[:, second])  # the other is written at once
    model.delete_adapter("second")
    first = layer_of(model).paca_indices["default"]
    untouched = torch.ones(7, dtype=torch.bool).index_fill_(0, first, False)
    assert torch.equal(layer_of(model).weight[:, untouched], original[:, untouched])


def test_accumulation_without_a_step_writes_nothing():
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    model(x).sum().backward()
    version = layer_of(model).base_layer.weight._version
    for _ in range(3):
        model(x).sum().backward()
    assert layer_of(model).base_layer.weight._version == version


def test_the_graph_holds_neither_the_input_nor_a_copy_of_the_weight():
    model = adapted_perceptron()
    model(torch.randn(4, 7))
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    x = torch.randn(50, 7) * 1
    alive = weakref.ref(x)
    y = layer_of(model)(x)
    del x
    gc.collect()
    assert alive() is None
    new = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before and o is not y]
    assert {tuple(o.shape) for o in new if o.numel() >= 7 * 13} <= {(50, 3)}
    y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_after_unload_raises_and_leaves_the_pretrained_weight(kind):
    model = adapted_perceptron(kind)
    loss = model(torch.randn(4, 7)).sum()
    stock = model.unload()
    with pytest.raises(RuntimeError, match="or its adapter unloaded"):
        loss.backward()
    for name, value in perceptron(kind).state_dict().items():
        assert torch.equal(stock.state_dict()[name], value)


@pytest.mark.parametrize("change", ["step", "switch"])
def test_a_first_pass_that_nobody_repeats_hinders_no_other_checkpointing(change):
    model, x = adapted_perceptron(), torch.randn(4, 7, requires_grad=True)
    second_adapter(model, r=3)
    checkpoint(model, x, use_reentrant=True)  # an evaluation whose result is dropped
    if change == "switch":
        model.set_adapter("second")
    else:
        with torch.no_grad():
            layer_of(model).paca_delta["default"].add_(1)
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, want)


def test_a_layer_that_runs_without_its_model_compares_once(monkeypatch):
    model, x, compared = adapted_perceptron(), torch.randn(4, 7), []
    layer = layer_of(model)
    model(x).sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    compare = type(layer.base_layer.columns).compare
    monkeypatch.setattr(
        type(layer.base_layer.columns), "compare", lambda self, weight: (compared.append(1), compare(self, weight))
    )
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    assert len(compared) == 1
    layer(x)
    model(x)
    for _ in range(3):
        layer(x)
    assert len(compared) == 4  # the model looked at both layers; then this one is in the mode of its pass


def test_a_load_while_merged_does_not_change_what_unmerging_puts_back():
    model = adapted_perceptron()
    second_adapter(model, r=3)
    before = base_state(model)
    model.merge_adapter(["default"])
    other = {name: value.clone() for name, value in model.state_dict().items() if "indices.default" in name}
    for value in other.values():
        value.copy_((value + 1) % 7)
    model.load_state_dict({name: value.sort().values for name, value in other.items()}, strict=False)
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    after = base_state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())

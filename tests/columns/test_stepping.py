"""The first door: after any optimizer's step, before anything else, the weights hold the deltas it wrote."""

from __future__ import annotations

import gc
import sys
import threading

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paca
from models import adapt
from paca.columns import stepping
from paca.layers import paca_layers

IN, WIDTH, OUT = 24, 32, 8
SETTINGS = {"r": 9, "paca_alpha": 3, "init_weights": False, "target_modules": ["0", "2"], "random_seed": 1}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUT)).to(dtype)


def adapted(dtype=torch.float32, selection="random", adapters=("default",)):
    model = adapt(network(dtype), adapters[0], r=8, selection=selection, target_modules=["0", "2"])
    for name in adapters[1:]:
        model.add_adapter(name, paca.PacaConfig(**SETTINGS, selection=selection))
    model.base_model.set_adapter(list(adapters))
    return model


def deltas_of(model, name="default"):
    return [layer.paca_delta[name] for layer in paca_layers(model)]


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = paca_layers(model)[0].base_layer.weight.dtype
    return model(torch.randn(5, IN, generator=generator).to(dtype)).float().square().mean()


def wanted_weights(model):
    """The invariant: each pretrained weight, with the active deltas as they are now, rounded once."""
    weights = []
    layers = paca_layers(model)
    for layer, stock in zip(layers, network(layers[0].base_layer.weight.dtype)[::2], strict=True):
        total = stock.weight.detach().float()
        for name in layer.active_adapters:
            delta, columns = layer.paca_delta[name].detach(), layer.paca_indices[name]
            total[:, columns] = torch.add(total[:, columns], delta, alpha=layer.scaling[name])
        weights.append(total.to(stock.weight.dtype))
    return weights


def holds(model, wanted=None):
    wanted = wanted_weights(model) if wanted is None else wanted
    weights = [layer.base_layer.weight for layer in paca_layers(model)]
    return [torch.equal(weight, want) for weight, want in zip(weights, wanted, strict=True)] == [True, True]


def versions(model):
    """How often each weight was written."""
    return [layer.base_layer.weight._version for layer in paca_layers(model)]


def bitsandbytes_adamw(parameters):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=0.1, min_8bit_size=0)
    probe = nn.Parameter(torch.ones(64, 64))
    probe.grad = torch.ones(64, 64)
    try:
        bitsandbytes.optim.AdamW8bit([probe], lr=0.1, min_8bit_size=0).step()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"bitsandbytes has no 8-bit AdamW here: {error}")
    return optimizer


def transformers_adafactor(parameters):
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False)


class ByHand(torch.optim.Optimizer):
    """Writes through `.data`, which no version counter shows."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Adafactor of transformers": transformers_adafactor,
    "8-bit AdamW": bitsandbytes_adamw,
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "a subclass that writes .data": ByHand,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("selection", ["random", "random_blocks"])
def test_after_each_step_the_weight_holds_the_deltas(name, selection):
    model = adapted(selection=selection)
    optimizer = OPTIMIZERS[name](deltas_of(model))
    for step in range(3):
        before = [d.detach().clone() for d in deltas_of(model)]
        loss_of(model, step).backward()
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, deltas_of(model), strict=True))
        assert holds(model)
        optimizer.zero_grad()
        assert holds(model)
    with model.disable_adapter():
        for layer, stock in zip(paca_layers(model), network()[::2], strict=True):
            assert torch.equal(layer.base_layer.weight, stock.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", ["random", "random_blocks"])
@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_weights_hold_the_float32_deltas_rounded_once(dtype, selection, fused):
    model = adapted(dtype, selection)
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=fused)
    loss_of(model).backward()
    optimizer.step()
    assert holds(model)


@pytest.mark.parametrize("selection", ["random", "random_blocks"])
def test_one_optimizer_that_trains_two_active_adapters(selection):
    model = adapted(selection=selection, adapters=("default", "second"))
    deltas = [*deltas_of(model), *deltas_of(model, "second")]
    for delta in deltas:
        delta.requires_grad_()
    optimizer = torch.optim.AdamW(deltas, lr=0.1, fused=True)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert holds(model)


def test_a_step_of_an_adapter_that_is_not_active_writes_nothing_and_is_not_lost():
    model = adapted(adapters=("default", "second"))
    model.base_model.set_adapter("second")
    model.base_model.set_adapter("default")
    optimizer = torch.optim.AdamW(deltas_of(model, "second"), lr=0.1, fused=True)
    for delta in deltas_of(model, "second"):
        delta.requires_grad_()
        delta.grad = torch.ones_like(delta)
    before = versions(model)
    optimizer.step()
    assert versions(model) == before
    assert holds(model)
    model.base_model.set_adapter("second")
    assert holds(model)


def test_an_optimizer_that_steps_while_the_adapter_is_disabled_writes_when_it_is_enabled():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    loss_of(model).backward()
    with model.disable_adapter():
        optimizer.step()
        for layer, stock in zip(paca_layers(model), network()[::2], strict=True):
            assert torch.equal(layer.base_layer.weight, stock.weight)
    assert holds(model)


def test_a_step_while_merged_leaves_what_is_merged():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    loss_of(model).backward()
    model.merge_adapter()
    merged = wanted_weights(model)
    optimizer.step()
    assert holds(model, merged)
    model.unmerge_adapter()
    assert holds(model)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_steps_inside_of_the_backward_pass(fused):
    model = adapted()
    optimizers = {delta: torch.optim.SGD([delta], lr=0.1, fused=fused) for delta in deltas_of(model)}
    seen = []

    def step(delta):
        optimizers[delta].step()
        optimizers[delta].zero_grad()
        index = [d is delta for d in deltas_of(model)].index(True)
        seen.append(torch.equal(paca_layers(model)[index].base_layer.weight, wanted_weights(model)[index]))

    for delta in optimizers:
        delta.register_post_accumulate_grad_hook(step)
    for seed in range(2):
        before = [d.detach().clone() for d in deltas_of(model)]
        loss_of(model, seed).backward()
        assert holds(model)
        assert not any(torch.equal(a, b) for a, b in zip(before, deltas_of(model), strict=True))
    assert seen == [True] * 4


def test_stepping_inside_of_the_backward_pass_gives_what_stepping_after_it_gives():
    inside, after = adapted(), adapted()
    optimizers = {delta: torch.optim.SGD([delta], lr=0.1) for delta in deltas_of(inside)}

    def step(delta):
        optimizers[delta].step()
        optimizers[delta].zero_grad()

    for delta in optimizers:
        delta.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.SGD(deltas_of(after), lr=0.1)
    for seed in range(3):
        loss_of(inside, seed).backward()
        loss_of(after, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(deltas_of(inside), deltas_of(after), strict=True):
        assert torch.equal(one, other)


def test_several_optimizers_write_what_each_holds():
    model = adapted()
    first, second = (torch.optim.AdamW([delta], lr=0.1, fused=True) for delta in deltas_of(model))
    before = wanted_weights(model)
    loss_of(model).backward()
    first.step()
    after = wanted_weights(model)
    assert holds(model, [after[0], before[1]])
    second.step()
    assert holds(model)


def test_an_optimizer_that_holds_some_deltas_writes_only_these():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model)[1:], lr=0.1)
    loss_of(model).backward()
    before = versions(model)
    optimizer.step()
    assert versions(model)[0] == before[0]
    assert versions(model)[1] > before[1]
    assert holds(model)


def test_a_delta_without_a_gradient_is_not_written():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1)
    loss_of(model).backward()
    deltas_of(model)[0].grad = None
    before = versions(model)
    optimizer.step()
    assert versions(model)[0] == before[0]
    assert holds(model)


def test_parameter_groups_also_one_that_is_added_later():
    model = adapted()
    first, second = deltas_of(model)
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.1}], fused=True)
    optimizer.add_param_group({"params": [second], "lr": 0.01})
    loss_of(model).backward()
    optimizer.step()
    assert holds(model)


def test_accumulation_writes_nothing_and_gives_the_same_step():
    accumulated, at_once = adapted(), adapted()
    one, other = (torch.optim.AdamW(deltas_of(model), lr=0.1) for model in (accumulated, at_once))
    before = versions(accumulated)
    for seed in range(3):
        loss_of(accumulated, seed).backward()
        assert versions(accumulated) == before
    sum(loss_of(at_once, seed) for seed in range(3)).backward()
    for a, b in zip(deltas_of(accumulated), deltas_of(at_once), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    one.step()
    other.step()
    assert holds(accumulated)
    assert all(now > then for now, then in zip(versions(accumulated), before, strict=True))


def test_a_step_writes_each_weight_once_and_the_passes_around_it_write_nothing():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1)
    for seed in range(3):
        loss_of(model, seed).backward()
        between = versions(model)
        optimizer.step()
        after = versions(model)
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        assert versions(model) == after
        if seed:
            assert [now - then for now, then in zip(after, between, strict=True)] == [1, 1]


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_of_an_optimizer_that_holds_none_of_ours_costs_nothing(monkeypatch):
    model = adapted()  # noqa: F841  (its deltas are known to the hook)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer = torch.optim.SGD([other], lr=0.1, foreach=False)

    def fail(*args):
        raise AssertionError("nothing of ours was stepped")

    monkeypatch.setattr(stepping, "write_together", fail)
    with Operators() as seen:
        optimizer.step()
    assert [name for name in seen.names if not name.startswith("_record_function")] == ["add_"]


def test_a_delta_that_nobody_steps_is_looked_at_alone():
    """Each look waits for the device: the layers whose deltas are stepped need none."""
    model = adapted()
    deltas_of(model)[0].requires_grad_(False)
    optimizer = torch.optim.SGD(deltas_of(model)[1:], lr=0.1)
    looks = []
    for _ in range(5):
        with Operators() as seen:
            loss_of(model).backward()
            optimizer.step()
        looks.append(seen.names.count("equal"))
    assert looks == [2, 1, 1, 1, 1]
    deltas_of(model)[0].data.add_(0.5)  # which no counter shows
    loss_of(model)
    assert holds(model)


def test_a_step_that_a_gradient_scaler_skips_leaves_the_weights():
    model = adapted()
    optimizer, scaler = torch.optim.SGD(deltas_of(model), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    before, wanted = versions(model), wanted_weights(model)
    scaler.scale(loss_of(model)).backward()
    deltas_of(model)[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert versions(model) == before
    assert holds(model, wanted)
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert holds(model)
    assert not holds(model, wanted)


def test_a_closure_sees_the_weights_of_each_trial():
    model = adapted()
    optimizer = torch.optim.LBFGS(deltas_of(model), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        seen.append(holds(model))
        loss.backward()
        return loss

    first = float(loss_of(model))
    for _ in range(2):
        optimizer.step(closure)
        assert holds(model)
    assert len(seen) > 4
    assert all(seen)
    assert float(loss_of(model)) < first


@pytest.mark.parametrize("alone", [False, True], ids=["the model", "its layers alone"])
@pytest.mark.parametrize("gradients", [False, True])
def test_closures_see_what_the_step_writes_through_data_between_them(gradients, alone):
    # As optimizers with two gradients a step (SAM) and with none (MeZO) try other values.
    class Tries(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure):
            for change in (0.5, -1.0, 0.5):
                for delta in deltas_of(model):
                    delta.data.add_(change)
                closure()

    def closure():
        with torch.set_grad_enabled(gradients):
            loss_of(model) if not alone else [layer(torch.ones(1, layer.in_features)) for layer in paca_layers(model)]
        seen.append(holds(model))

    model, seen = adapted(), []
    optimizer = Tries(deltas_of(model), lr=0.1)
    for _ in range(2):  # from the second step on it is known as one whose steps are seen
        loss_of(model).backward()
        optimizer.step(closure)
    assert seen == [True] * 6


def test_closures_see_it_also_after_another_optimizers_step_within_that_step():
    class Wraps(torch.optim.SGD):  # as SAM and Lookahead do
        def step(self, closure):
            base.step()
            with torch.no_grad():
                for delta in deltas_of(model):
                    delta.data.add_(0.5)
            closure()

    model, seen = adapted(), []
    base = torch.optim.SGD(deltas_of(model), lr=0.1)
    optimizer = Wraps(deltas_of(model), lr=0.1)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step(lambda: (loss_of(model), seen.append(holds(model))))
    assert seen == [True] * 2
    assert not stepping.STEPPING


def test_a_hook_of_the_users_own_after_a_fused_step_sees_its_weights():
    model, seen = adapted(), []
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)

    def run(*_):  # before the hooks of all optimizers
        loss_of(model)
        seen.append(holds(model))

    optimizer.register_step_post_hook(run)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
    assert seen == [True] * 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trusted", [False, True])
def test_an_optimizer_that_drops_its_gradients_in_its_own_step_is_noticed_by_the_next_pass(fused, trusted):
    # Its own hooks run before those of all optimizers, and a subclass may free gradients itself.
    model = adapted()
    if trusted:
        loss_of(model).backward()
        torch.optim.SGD(deltas_of(model), lr=0.1).step()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=fused)
    optimizer.register_step_post_hook(lambda o, args, kwargs: o.zero_grad())
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step()
        assert all(delta.grad is None for delta in deltas_of(model))
        loss_of(model, seed)
        assert holds(model)


def test_a_step_that_fails_leaves_no_mark():
    model = adapted()

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    loss_of(model).backward()
    with pytest.raises(ArithmeticError):
        Fails(deltas_of(model), lr=0.1).step()
    seen = []

    def look():
        deltas_of(model)[0].detach().add_(1)
        with torch.no_grad():
            loss_of(model)
        seen.append(holds(model))

    thread = threading.Thread(target=look)  # another thread must not wait for the end of that step for ever
    thread.start()
    thread.join()
    assert seen == [True]


@pytest.mark.parametrize("gradients_before", [False, True])
def test_a_step_that_wrote_without_a_trace_and_then_failed_is_found(gradients_before):
    model = adapted()
    optimizer = torch.optim.SGD(deltas_of(model), lr=0.1)
    loss_of(model).backward()
    optimizer.step()  # from here on its steps are known to be seen
    optimizer.zero_grad()

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            for delta in deltas_of(model):
                delta.data.add_(1)
            raise KeyboardInterrupt

    if gradients_before:
        loss_of(model).backward()
    with pytest.raises(KeyboardInterrupt):
        Interrupted(deltas_of(model), lr=0.1).step(lambda: loss_of(model).backward())
    loss_of(model)
    assert holds(model)


def test_a_backward_pass_after_a_fused_step_raises():
    model = adapted()
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    loss_of(model, 0).backward()
    pending = loss_of(model, 1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="were modified between forward and backward"):
        pending.backward()


def test_the_hook_does_not_keep_a_model_alive():
    gc.collect()
    before = len(stepping._DELTAS)
    model = adapted()
    assert len(stepping._DELTAS) == before + 2
    del model
    gc.collect()
    assert len(stepping._DELTAS) == before


def test_a_delta_that_is_replaced_is_known_to_the_hook():
    model = adapted()
    for layer in paca_layers(model):
        layer.paca_delta["default"] = nn.Parameter(layer.paca_delta["default"].detach() + 1)
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    loss_of(model).backward()
    optimizer.step()
    assert holds(model)


def test_a_moved_model_is_known_to_the_hook():
    model = adapted().to(torch.float64).to(torch.float32)
    optimizer = torch.optim.AdamW(deltas_of(model), lr=0.1, fused=True)
    loss_of(model).backward()
    optimizer.step()
    assert holds(model)


def test_a_step_without_gradients_is_found_also_where_the_weights_are_parked():
    class Estimates(torch.optim.Optimizer):
        """As MeZO does: writes parameters that have no gradient, here through `.data`."""

        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(0.1)

    model = adapted().eval()
    optimizer = Estimates(deltas_of(model), {})
    with torch.no_grad():
        loss_of(model)
        model.state_dict()  # parks
        optimizer.step()
        loss_of(model)
    for layer, want in zip(paca_layers(model), wanted_weights(model), strict=True):
        assert torch.equal(layer.base_layer.weight, want)


def test_a_step_is_seen_though_its_thread_leaves_a_generator_meanwhile(monkeypatch):
    """Adam asks `any(... for p in ...)`: a frame that yielded before it was looked at has no caller any more."""
    model = adapted()
    within, go_on = threading.Event(), threading.Event()

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            within.set()
            go_on.wait(20)

    optimizer = Slow(deltas_of(model), lr=1e-3)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    try:
        assert within.wait(20)
        left = (number for number in (1, 2))
        next(left)
        frames, real = [left.gi_frame], sys._current_frames
        monkeypatch.setattr(sys, "_current_frames", lambda: {thread.ident: frames.pop()} if frames else real())
        assert stepping.others_step(paca_layers(model))
        assert not frames
    finally:
        go_on.set()
        thread.join()


def test_values_swapped_through_data_and_back_count_where_no_weight_holds_columns():
    quantization = pytest.importorskip("torchao.quantization")
    net = network()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    model, x = peft.get_peft_model(net, paca.PacaConfig(**SETTINGS)), torch.ones(1, IN)
    model(x).sum().backward()
    torch.optim.SGD(deltas_of(model), lr=0.1).step()
    trained = model(x)
    trained.sum().backward()
    for change in (0.5, -0.5):  # an average comes for an evaluation, and goes
        for delta in deltas_of(model):
            delta.data.add_(change)
        model.train(change < 0)
        with torch.set_grad_enabled(change < 0):
            seen = model(x)
        assert torch.allclose(seen, trained, atol=1e-5) == (change < 0)

"""Rotation of the trained columns: against a dense float64 copy whose mask of columns moves, and the invariants."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import paca
from expert_models import STACKS, mixtral
from layers.small_networks import TARGETS, adapted_network, example, network
from models import adapt, adapted_perceptron, base_state, perceptron, tokens
from paca.config import ROTATIONS
from paca.layers import paca_layers
from paca.tuner.rotation.pickers import PICKERS, RotatingLayer
from reference import rounded_sum
from rotating import equal, named_layers, rotated, train, trainable, weights

OPTIMIZERS = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0, foreach=False),
    "foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0, foreach=True),
    "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0, fused=True),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


def loss_of(outputs):
    return getattr(outputs, "logits", outputs).square().mean()


def dense_training(stock, targets, columns_of_step, inputs, make_optimizer, rate, steps, scale, every):
    """The same training written out: every weight is W0 + scale * D with a dense D, and only the columns whose turn it
    is get a gradient; a new optimizer at each rotation."""
    originals = {name: p.detach() for name, p in stock.named_parameters()}
    changes = {name: torch.zeros_like(originals[name]).requires_grad_() for name, _ in targets}
    optimizer = make_optimizer(list(changes.values()), rate(0))
    for step in range(steps):
        if step and step % every == 0:
            optimizer = make_optimizer(list(changes.values()), rate(step))
        optimizer.param_groups[0]["lr"] = rate(step)
        changed = {name: originals[name] + scale * changes[name] for name in changes}
        loss_of(torch.func.functional_call(stock, changed, (inputs,))).backward()
        for name, column_dim in targets:
            mask = torch.zeros(changes[name].shape[column_dim], dtype=torch.bool)
            mask[columns_of_step[step][name]] = True
            shape = [1] * changes[name].dim()
            shape[column_dim] = -1
            changes[name].grad.mul_(mask.view(shape))
        optimizer.step()
        optimizer.zero_grad()
    return {name: originals[name] + scale * changes[name].detach() for name in changes}


SETTINGS = {
    "linear": (lambda: perceptron("linear", torch.float64), {"target_modules": ["lin1", "lin2"], "r": 3}),
    "conv1d": (lambda: perceptron("conv1d", torch.float64), {"target_modules": ["lin1", "lin2"], "r": 3}),
    "images": (lambda: network("images", torch.float64), {"target_modules": TARGETS, "r": 2}),
    "words": (lambda: network("words", torch.float64), {"target_modules": TARGETS, "r": 2}),
    "volume": (lambda: network("volume", torch.float64), {"target_modules": TARGETS, "r": 2}),
    "experts": (lambda: mixtral("eager", num_hidden_layers=1).double(), {"target_parameters": STACKS, "r": 20}),
}


def inputs_for(kind):
    if kind in ("linear", "conv1d"):
        return torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tokens() if kind == "experts" else example(kind, torch.float64)


@pytest.mark.parametrize(
    ("kind", "optimizer_name"),
    [("linear", name) for name in OPTIMIZERS] + [(kind, "adamw") for kind in SETTINGS if kind != "linear"],
)
def test_training_is_that_of_a_dense_copy_whose_mask_of_columns_moves(kind, optimizer_name):
    build, settings = SETTINGS[kind]
    make_optimizer, inputs, every, steps = OPTIMIZERS[optimizer_name], inputs_for(kind), 2, 9

    def rate(step):
        return 0.02 / (1 + step)

    model = adapt(build(), **{"paca_alpha": 2 * settings["r"], "init_weights": True, **settings})
    layers, seen = named_layers(model), []
    optimizer = make_optimizer(trainable(model), rate(0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / rate(0))
    for step in range(steps):
        if step and step % every == 0:
            paca.rotate(model, optimizer, step // every)
        seen.append(paca.trained_columns(model))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step))
        loss_of(model(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        model(inputs)
    suffix = "" if kind == "experts" else ".weight"
    targets = [(name + suffix, layer.base_layer.input_dim) for name, layer in layers.items()]
    seen = [{name + suffix: columns for name, columns in step.items()} for step in seen]
    expected = dense_training(build(), targets, seen, inputs, make_optimizer, rate, steps, 2.0, every)
    repicked = False
    for name, layer in layers.items():
        torch.testing.assert_close(layer.base_layer.weight.detach(), expected[name + suffix], rtol=1e-9, atol=1e-11)
        turns = [set(step[name + suffix]) for step in seen[::every]]
        assert all(a != b for a, b in itertools.pairwise(turns) if layer.in_features > settings["r"])
        repicked |= any(turns[n] & set().union(*turns[: n - 1]) for n in range(2, len(turns)))
    assert repicked or kind == "experts"  # some columns were dropped and taken up again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_rotation_writes_nothing_and_changes_no_output(dtype, kind):
    model, x = adapted_perceptron(kind, dtype, paca_alpha=5), torch.randn(6, 7).to(dtype)
    for number in range(1, 5):
        train(model, x, steps=2)
        with torch.no_grad():
            y, before = model(x), weights(model)
        versions = [layer.base_layer.weight._version for layer in paca_layers(model)]
        paca.rotate(model, None, number)
        assert versions == [layer.base_layer.weight._version for layer in paca_layers(model)]
        assert equal(before, weights(model))
        with torch.no_grad():
            assert torch.equal(model(x), y)
        assert equal(before, weights(model))
        for layer in paca_layers(model):  # what is kept on the CPU is what was folded, and no more
            assert torch.equal(layer.base_layer.columns._folded.positions, layer.folded["default"].indices)
        with model.disable_adapter():
            model(x)
        with torch.no_grad():  # put in anew, piece by piece
            assert torch.equal(model(x), y)
        assert equal(before, weights(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_the_sum_over_all_columns_ever_trained_rounded_once(dtype):
    stock = perceptron(dtype=dtype)
    x = torch.randn(6, 7).to(dtype)
    model = rotated(adapted_perceptron(dtype=dtype, paca_alpha=5), x)
    for name, layer in named_layers(model).items():
        columns = [(c.delta, c.indices, c.scale) for c in layer.columns_of("default").parts()]
        assert torch.equal(layer.base_layer.weight, rounded_sum(stock.get_submodule(name).weight, columns))


WAYS_OUT = {
    "disable": lambda model: model.disable_adapter_layers() or weights(model),
    "another": lambda model: model.set_adapter("other") or model.base_model.set_adapter([]) or weights(model),
    "state_dict": lambda model: list(base_state(model).values()),
    "unload": lambda model: list(model.unload().state_dict().values()),
    "delete": lambda model: model.delete_adapter("default") or list(base_state(model).values()),
    "deepcopy": lambda model: list(base_state(copy.deepcopy(model)).values()),
    "pickle": lambda model: list(base_state(pickle.loads(pickle.dumps(model))).values()),
    "double": lambda model: list(base_state(model.double()).values()),
}


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pretrained_weight_comes_back_bitwise(way, dtype):
    x = torch.randn(6, 7).to(dtype)
    stock = list(perceptron(dtype=dtype).state_dict().values())
    model = adapted_perceptron(dtype=dtype)
    model.add_adapter("other", paca.PacaConfig(r=2, target_modules=["lin1"]))
    rotated(model, x, rotations=4)
    if way == "another" or way == "disable":
        stock = [stock[0], stock[2]]
    assert not equal(stock[:1], weights(model)[:1])
    back = WAYS_OUT[way](model)
    assert equal([s.double() for s in stock], [b.double() for b in back])


def test_a_copy_and_a_pickled_model_go_on_as_the_original_does():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    twins = []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(twin, x, steps=4, every=2, done=8)
        twins.append(twin)
    train(model, x, steps=4, every=2, done=8)
    with torch.no_grad():
        for twin in twins:
            assert torch.equal(model(x), twin(x))


def test_a_backward_pass_across_a_rotation_raises():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    loss = model(x).square().mean()
    before = paca.trained_columns(model)
    paca.rotate(model, None, 9)
    with pytest.raises(RuntimeError, match="rotated"):
        loss.backward()
    loss = model(x).square().mean()
    paca.set_trained_columns(model, before)
    with pytest.raises(RuntimeError, match="rotated"):
        loss.backward()


def test_a_backward_pass_after_the_adapter_was_disabled_puts_everything_back():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in trainable(model)]
    for p in trainable(model):
        p.grad = None
    held = weights(model)
    loss = model(x).square().mean()
    with model.disable_adapter(), torch.no_grad():
        model(x)
    loss.backward()
    assert equal(expected, [p.grad for p in trainable(model)])
    assert equal(held, weights(model))


def test_somebody_who_writes_over_folded_columns_is_noticed():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    layer = paca_layers(model)[0]
    with torch.no_grad():
        layer.base_layer.weight[:, layer.folded["default"].indices[0]] += 1
        with pytest.raises(RuntimeError, match="written or replaced"):
            model(x)


def test_a_scale_moves_the_folded_columns_too():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(dtype=torch.float64), x.double())
    stock = perceptron(dtype=torch.float64)
    for layer in paca_layers(model):
        layer.set_scale("default", 0.5)
    with torch.no_grad():
        model(x.double())
    for name, layer in named_layers(model).items():
        original = stock.get_submodule(name).weight
        torch.testing.assert_close(layer.base_layer.weight - original, layer.get_delta_weight("default"))
        assert (layer.get_delta_weight("default") != 0).any(0).sum() > layer.r["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_folded_columns_add_up(dtype):
    x, stock = torch.randn(6, 7).to(dtype), perceptron(dtype=dtype)
    model = adapted_perceptron(dtype=dtype)
    model.add_adapter("second", paca.PacaConfig(r=4, paca_alpha=2, target_modules=["lin1", "lin2"], random_seed=1))
    rotated(model, x)
    model.set_adapter("second")
    rotated(model, x)
    model.base_model.set_adapter(["default", "second"])
    model.requires_grad_(False)
    held = []
    for number in range(2):  # before and after a rotation while both are active
        with torch.no_grad():
            model(x)
        for name, layer in named_layers(model).items():
            parts = [c for adapter in ("default", "second") for c in layer.columns_of(adapter).parts()]
            columns = [(c.delta, c.indices, c.scale) for c in parts]
            assert torch.equal(layer.base_layer.weight, rounded_sum(stock.get_submodule(name).weight, columns))
        held.append(weights(model))
        paca.rotate(model, None, 7 + number, adapter_name="second")
    assert equal(*held)
    assert equal([p.detach() for p in (stock.lin1.weight, stock.lin2.weight)], [*base_state(model).values()][::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_gives_the_resident_bits_and_unmerging_the_pretrained_ones(dtype):
    x = torch.randn(6, 7).to(dtype)
    model = rotated(adapted_perceptron(dtype=dtype, paca_alpha=5), x)
    held = weights(model)
    model.merge_adapter()
    assert equal(held, weights(model))
    with pytest.raises(ValueError, match="merged"):
        paca.rotate(model, None, 9)
    model.unmerge_adapter()
    stock = perceptron(dtype=dtype)
    assert equal(held, weights(model))  # the adapter is active
    with model.disable_adapter():
        assert equal([stock.lin1.weight.detach(), stock.lin2.weight.detach()], weights(model))
    plain = model.merge_and_unload()
    assert equal(held, [plain.lin1.weight.detach(), plain.lin2.weight.detach()])


# -- the optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_starts_anew_for_the_deltas_alone(name):
    x = torch.randn(6, 7)
    model = adapt(nn.Sequential(perceptron(), nn.Linear(5, 5)), target_modules=["lin1", "lin2"])
    model.get_base_model()[1].requires_grad_(True)
    optimizer = OPTIMIZERS[name](trainable(model), 0.1)
    train(model, x, steps=3, optimizer=optimizer)
    others = [p for n, p in model.named_parameters() if p.requires_grad and "paca_delta" not in n]
    kept = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in others]
    assert len(optimizer.state) == len(trainable(model)) == 4
    paca.rotate(model, optimizer, 1)
    assert set(optimizer.state) == set(others)
    for p, state in zip(others, kept, strict=True):
        assert all(torch.equal(torch.as_tensor(optimizer.state[p][k]), v) for k, v in state.items())
    train(model, x, optimizer=optimizer)
    steps = [float(optimizer.state[p]["step"]) for p in trainable(model) if "step" in optimizer.state[p]]
    assert sorted(steps) == ([] if name == "momentum" else [1, 1, 4, 4])


def test_gradients_of_the_columns_that_were_trained_are_dropped():
    model = adapted_perceptron()
    model(torch.randn(6, 7)).sum().backward()
    assert all(p.grad is not None for p in trainable(model))
    paca.rotate(model, None, 1)
    assert all(p.grad is None for p in trainable(model))


def test_an_optimizer_that_holds_another_is_refused_and_nothing_changes():
    class Outer(torch.optim.SGD):  # as torch's ZeroRedundancyOptimizer: the state is in `optim`
        def __init__(self, parameters):
            super().__init__(parameters)
            self.optim = torch.optim.AdamW(parameters)

    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    before = paca.trained_columns(model)
    with pytest.raises(ValueError, match=r"^An? Outer keeps the state of its parameters in an optimizer of its own"):
        paca.rotate(model, Outer(trainable(model)), 4)
    assert paca.trained_columns(model) == before


def test_an_optimizer_that_shares_its_state_with_another_is_cleared():
    class Outer(torch.optim.SGD):  # as torch's PostLocalSGDOptimizer
        def __init__(self, parameters):
            super().__init__(parameters)
            self.optim = torch.optim.AdamW(parameters)
            self.state = self.optim.state

    model, x = adapted_perceptron(), torch.randn(6, 7)
    optimizer = Outer(trainable(model))
    model(x).square().sum().backward()
    optimizer.optim.step()
    assert optimizer.state
    paca.rotate(model, optimizer, 1)
    assert not optimizer.state


def test_an_optimizer_without_the_deltas_is_refused_and_nothing_changes():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    before = paca.trained_columns(model)
    with pytest.raises(ValueError, match="does not hold"):
        paca.rotate(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), 4)
    with pytest.raises(ValueError, match="lin2: 2 columns were picked"):
        paca.rotate(model, None, 4, pick=lambda layer: torch.arange(3 if layer.name == "lin1" else 2))
    assert paca.trained_columns(model) == before


# -- which columns --------------------------------------------------------------------------------------------------


def test_pickers_are_those_that_the_config_knows():
    assert tuple(PICKERS) == ROTATIONS


@pytest.mark.parametrize("pick", ROTATIONS)
def test_every_column_has_its_turn_before_any_has_a_second(pick):
    model = adapted_perceptron(rotate_by=pick)
    turns = [paca.trained_columns(model)]
    for number in range(1, 5):
        paca.rotate(model, None, number)
        turns.append(paca.trained_columns(model))
    firsts = [column for turn in turns[:4] for column in turn["lin2"]]
    assert len(firsts) == len(set(firsts)) == 12
    assert {*firsts, *turns[4]["lin2"]} == set(range(13))
    if pick == "weight_norm":
        norms = perceptron().lin2.weight.norm(dim=0)
        free = [c for c in norms.argsort(descending=True).tolist() if c not in turns[0]["lin2"]]
        assert turns[1]["lin2"] == sorted(free[:3])


def test_random_picks_depend_on_seed_name_and_number_alone():
    def picks(number, **settings):
        model = adapted_perceptron(**settings)
        layer = paca_layers(model)[1]
        return PICKERS["random"](RotatingLayer("lin2", layer, "default", number, settings.get("random_seed", 0)))

    first = picks(1)
    torch.rand(3)
    assert torch.equal(first, picks(1))
    assert not torch.equal(first, picks(2))
    assert not torch.equal(first, picks(1, random_seed=1))


def test_a_function_may_pick():
    model = adapted_perceptron()
    paca.rotate(model, None, 1, pick=lambda layer: torch.tensor([5, 0, 2]))
    assert paca.trained_columns(model) == {"lin1": [0, 2, 5], "lin2": [0, 2, 5]}


# -- beside other features ------------------------------------------------------------------------------------------


def test_a_weighted_sum_has_the_folded_columns_of_its_adapters():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(rotate_every=2), x)
    with torch.no_grad():
        y = model(x)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
    assert model.peft_config["sum"].rotate_every is None


def test_what_a_rotated_adapter_can_not_do_is_refused(tmp_path):
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    adapted_perceptron().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rotated.*load_adapter"):
        paca.hotswap_adapter(model, str(tmp_path), "default")
    model.eval()
    with pytest.raises(ValueError, match=r"rotated.*load_adapter"):
        model(x, adapter_names=["default"] * 6)
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="adapter_name must say"):
        paca.rotate(model, None, 1)
    with pytest.raises(ValueError, match="no PaCA adapter 'other'"):
        paca.rotate(model, None, 1, adapter_name="other")


@pytest.mark.parametrize("setting", [{"rotate_every": 0}, {"rotate_every": True}, {"rotate_by": "luck"}])
def test_settings_that_can_not_work_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        paca.PacaConfig(**setting)


def test_a_compiled_model_rotates_without_being_compiled_again():
    torch._dynamo.reset()
    x = torch.randn(6, 7)
    model, eager = adapted_perceptron(), adapted_perceptron()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.get_base_model(), backend=frames)
    optimizers = [torch.optim.SGD(trainable(m), lr=0.1) for m in (model, eager)]
    for number in range(4):
        for run, m, optimizer in ((compiled, model, optimizers[0]), (eager, eager, optimizers[1])):
            if number:
                paca.rotate(m, optimizer, number)
            run(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert frames.frame_count == 1
    for one, two in zip(paca_layers(model), paca_layers(eager), strict=True):
        torch.testing.assert_close(one.get_delta_weight("default"), two.get_delta_weight("default"))
    pending = compiled(x).square().mean()
    paca.rotate(model, None, 5)
    with pytest.raises(RuntimeError, match=r"rotated|modified by an inplace"):
        pending.backward()


@pytest.mark.parametrize(
    ("number", "pick", "message"),
    [(0, None, "counted from 1; got 0"), (1, 5, "pick=5 is unknown"), (1, lambda layer: None, "columns must be")],
)
def test_a_rotation_that_makes_no_sense_is_refused(number, pick, message):
    with pytest.raises(ValueError, match=message):
        paca.rotate(adapt(perceptron(), target_modules=["lin1"], r=2), None, number, pick=pick)


def test_layers_that_are_not_written_are_refused():
    from quantized_layers import quantized_linear

    model = perceptron()
    model.lin1 = quantized_linear("nf4", nn.Linear(64, 13))
    model = adapt(model, target_modules=["lin1"])
    with pytest.raises(ValueError, match="lin1 can't be rotated: its weight is quantized"):
        paca.rotate(model, None, 1)


def test_a_model_that_fsdp_shards_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted_perceptron()
        fully_shard(model.get_base_model(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded by FSDP"):
            paca.rotate(model, None, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_adapted_networks_give_back_their_pretrained_weights():
    for kind in ("images", "words", "volume"):
        model = rotated(adapted_network(kind), example(kind))
        for name, value in network(kind).state_dict().items():
            assert torch.equal(base_state(model)[name], value)

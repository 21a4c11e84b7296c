"""Mixed batches of a whole model: `adapter_names` in `forward` and `generate`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import threading

import pytest
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

import paca
from distributed.threads import check_at_once
from expert_models import STACKS, mixtral
from models import adapt, adapted_perceptron, base_state, gpt2, llama, perceptron, tokens
from operation_sequences.interrupts import FOLDERS, interrupted_at
from paca.layers import paca_layers
from paca.layers.mixed_batch import Running
from paca.tuner.entry import entry_of

BASE = "__base__"
NAMES = ["default", "small", BASE, "other", "small", "default"]


def add_others(model):
    """A rank-1 adapter, and one of other targets, rank and columns; `default` stays active."""
    paca_linear = {type(m).__name__ for m in model.modules()}
    other = ["c_fc"] if "ResidentConv1D" in paca_linear else ["q_proj", "down_proj"]
    model.add_adapter("small", paca.PacaConfig(r=1, paca_alpha=3, init_weights=False, random_seed=1))
    model.add_adapter("other", paca.PacaConfig(r=7, paca_alpha=2, init_weights=False, target_modules=other))
    return model.eval()


def language_model(make=llama, dtype=torch.float64):
    return add_others(adapt(make(), task_type="CAUSAL_LM")).to(dtype)


def perceptron_with_three(kind="linear", dtype=torch.float32):
    model = adapted_perceptron(kind, dtype)
    model.add_adapter("small", paca.PacaConfig(r=1, random_seed=1, init_weights=False, target_modules=["lin1", "lin2"]))
    model.add_adapter("other", paca.PacaConfig(r=7, init_weights=False, target_modules=["lin1"]))
    return model.eval()


def alone(model, names, run):
    """What `run(sample)` gives for each sample's adapter, run in turn through the ordinary, resident way."""
    active = model.active_adapters
    results = []
    for sample, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                results.append(run(sample))
        else:
            model.set_adapter(name)
            results.append(run(sample))
    model.base_model.set_adapter(active)
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [llama, gpt2])
@torch.no_grad()
def test_a_mixed_batch_equals_each_adapter_alone(make, dtype):
    model = language_model(make, dtype)
    ids = tokens(len(NAMES))
    before = model(input_ids=ids).logits
    mixed = model(input_ids=ids, adapter_names=NAMES).logits
    for got, want in zip(mixed, alone(model, NAMES, lambda n: model(input_ids=ids[n : n + 1]).logits[0]), strict=True):
        # 2 layers of 7 maps, inner dimension 48 at most; the logits are about 1.
        torch.testing.assert_close(got, want, rtol=0, atol=2000 * torch.finfo(dtype).eps)
    assert torch.equal(model(input_ids=ids).logits, before)  # the active adapter again
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert torch.equal(mixed[2], base[2])
    assert not torch.allclose(mixed[0], base[0], atol=1e-3)
    assert not torch.allclose(mixed[1], base[1], atol=1e-3)
    assert not torch.allclose(mixed[3], base[3], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@torch.no_grad()
def test_a_layer_agrees_with_the_resident_one_within_the_rounding_of_the_weight(kind, dtype):
    model = perceptron_with_three(kind, dtype)
    layer = model.base_model.model.lin1
    x = torch.randn(len(NAMES), 3, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    taken = []
    layer.register_forward_hook(lambda module, args, output: taken.append(output))
    model(x, adapter_names=NAMES)
    mixed = taken.pop()
    weight = layer.base_layer.state_dict()["weight"]
    weight = weight if kind == "linear" else weight.t()
    eps = torch.finfo(dtype).eps
    for n, name in enumerate(NAMES):
        resident = alone(model, [name], lambda _, n=n: model(x[n]))
        resident = taken.pop()
        size = x[n].abs().double() @ weight.abs().double().t() + layer.base_layer.bias.abs().double()
        if name != BASE:
            change = layer.get_delta_weight(name).abs().double()
            size = size + x[n].abs().double() @ (change if kind == "linear" else change.t()).t()
        # Both round weights (or deltas) and sums of 8 terms; each rounding is half an eps of what is summed up.
        bound = 8 * eps * size
        assert bool(((mixed[n].double() - resident.double()).abs() <= bound).all()), name


def test_gradients_are_those_of_each_adapter_alone():
    model = perceptron_with_three(dtype=torch.float64)
    deltas = {n: p for n, p in model.named_parameters() if "paca_delta" in n}
    x = torch.randn(len(NAMES), 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(NAMES), 5, dtype=torch.float64)
    model.set_requires_grad(["default", "small", "other"])

    def gradients(losses):
        for p in (x, *deltas.values()):
            p.grad = None
        for loss in losses:
            loss.backward()
        return {"x": x.grad, **{n: p.grad for n, p in deltas.items()}}

    got = gradients([(model(x, adapter_names=NAMES) * weights).sum()])

    def losses():
        for n, name in enumerate(NAMES):
            if name == BASE:
                with model.disable_adapter():
                    yield (model(x[n : n + 1]) * weights[n]).sum()
            else:
                model.set_adapter(name)
                yield (model(x[n : n + 1]) * weights[n]).sum()

    want = gradients(losses())
    assert sum(g is not None for g in got.values()) == 1 + 2 + 2 + 1
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)


def test_passes_of_both_kinds_may_run_before_their_backward_passes():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    names = ["small", "default", BASE]
    want = {}
    for order in ("apart", "mixed first", "ordinary first"):
        model = perceptron_with_three(dtype=torch.float64)
        model.set_requires_grad(["default", "small"])
        parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
        x.grad = None

        def ordinary(model=model):
            return model(x).square().sum()

        def mixed(model=model):
            return model(x, adapter_names=names).cos().sum()

        if order == "apart":
            mixed().backward()
            ordinary().backward()
        else:
            first, second = (mixed, ordinary) if order == "mixed first" else (ordinary, mixed)
            losses = [first(), second()]
            losses[0].backward()
            losses[1].backward()
        for n, p in enumerate(parameters):
            torch.testing.assert_close(p.grad, want.setdefault(n, p.grad.clone()), rtol=1e-12, atol=1e-12)


def test_training_a_mixed_batch_lowers_each_adapters_loss_and_leaves_the_base_alone():
    model = perceptron_with_three()
    originals = base_state(model)
    model.set_requires_grad(["default", "small", "other"])
    x, target = torch.randn(6, 7), torch.randn(6, 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = (model(x, adapter_names=NAMES) - target).square().mean(1)
        losses.append(loss.detach())
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][2] == losses[0][2]  # the base model's sample
    others = [0, 1, 3, 4, 5]
    assert bool((losses[-1][others] < losses[0][others]).all())
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


def test_a_hidden_write_after_a_mixed_backward_pass_is_seen():
    model = perceptron_with_three()
    x = torch.randn(2, 7)  # the first layer's input needs no gradient
    loss = model(x, adapter_names=["default", BASE]).sum()
    with torch.no_grad():
        stale = model(x)  # the active adapter is in the weight again
    loss.backward()
    for layer in paca_layers(model):
        layer.paca_delta["default"].data.add_(1)
        layer.paca_delta["default"].grad = None
    with torch.no_grad():
        got = model(x)
        paca.refresh(model)
        assert torch.equal(got, model(x))
    assert not torch.equal(got, stale)


@pytest.mark.parametrize("names", [["default"] * 4, NAMES[:4]])
def test_checkpointing_that_recomputes_outside_of_the_batch_raises(names):
    model = perceptron_with_three()
    layer = model.base_model.model.lin1
    x = torch.randn(4, 7, requires_grad=True)
    plain = layer.forward
    layer.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    loss = model(x, adapter_names=names).sum()
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError)):
        loss.backward()


@torch.no_grad()
def test_mixed_batches_one_after_another_write_nothing():
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    model(x, adapter_names=["default", "small"])
    versions = [layer.base_layer.weight._version for layer in paca_layers(model)]
    for names in (["small", BASE], ["other", "default"]):
        model(x, adapter_names=names)
        model.base_model.model.lin1.park()
    assert [layer.base_layer.weight._version for layer in paca_layers(model)] == versions
    assert not any(layer.base_layer.columns.state.columns for layer in paca_layers(model))


@torch.no_grad()
def test_the_active_adapters_do_not_matter():
    model = perceptron_with_three()
    x = torch.randn(len(NAMES), 7)
    want = model(x, adapter_names=NAMES)
    for active in (["small"], ["default", "other"]):
        model.base_model.set_adapter(active)
        assert torch.equal(model(x, adapter_names=NAMES), want)


@torch.no_grad()
def test_a_scale_counts_in_a_mixed_batch():
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    names = ["default", "small"]
    for layer in paca_layers(model):
        layer.set_scale("default", 0.5)
    mixed = model(x, adapter_names=names)
    want = alone(model, names, lambda n: model(x[n : n + 1])[0])
    torch.testing.assert_close(mixed, torch.stack(want))


# -- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0)},
    ],
)
@torch.no_grad()
def test_generation_gives_each_sample_its_adapter(settings):
    model = language_model()
    ids = tokens(len(NAMES), 5)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, **arguments)
    per_sample = mixed.view(len(NAMES), -1, mixed.shape[-1])
    want = alone(model, NAMES, lambda n: model.generate(input_ids=ids[n : n + 1], **arguments))
    for got, w in zip(per_sample, want, strict=True):
        assert torch.equal(got, w)
    assert len({tuple(w[0, 5:].tolist()) for w in want}) > 1


@torch.no_grad()
def test_several_sampled_answers_of_a_sample_have_its_adapter():
    model = language_model()
    seen = []
    layer = paca_layers(model)[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    got = model.generate(
        input_ids=tokens(2, 5), adapter_names=["small", BASE], do_sample=True, num_return_sequences=3, max_new_tokens=2
    )
    assert got.shape[0] == 6
    assert set(seen) == {6}


@torch.no_grad()
def test_beams_of_an_encoder_and_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = adapt(T5ForConditionalGeneration(config), target_modules=["q", "v", "wi"], task_type="SEQ_2_SEQ_LM")
    model.add_adapter("small", paca.PacaConfig(r=1, init_weights=False, target_modules=["q", "v", "wo"]))
    model = model.eval().double()
    names = ["small", BASE, "default"]
    ids = tokens(3, 7)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=ids, adapter_names=names, **arguments)
    want = alone(model, names, lambda n: model.generate(input_ids=ids[n : n + 1], **arguments)[0])
    assert torch.equal(mixed, torch.stack(want))


# -- modules trained whole ------------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    config = llama().config
    config.num_labels = 3
    settings = {"init_weights": False, "modules_to_save": ["score"]}
    model = adapt(LlamaForSequenceClassification(config), target_modules=["q_proj"], **settings)
    model.add_adapter("small", paca.PacaConfig(r=1, target_modules=["v_proj"], **settings))
    model.add_adapter("headless", paca.PacaConfig(r=2, init_weights=False, target_modules=["k_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.normal_()
    return model.eval().double()


@pytest.mark.parametrize("active", ["default", "headless"])
@torch.no_grad()
def test_modules_that_are_trained_whole_follow_their_adapter(active):
    model = classifier()
    model.set_adapter(active)
    names = ["default", BASE, "small", "small", "headless"]
    ids = tokens(5)
    mixed = model(input_ids=ids, adapter_names=names).logits
    heads = dict(model.named_modules())["base_model.model.score"].modules_to_save
    assert not torch.equal(heads["default"].weight, heads["small"].weight)
    assert "headless" not in heads
    for n, name in enumerate(names):
        want = alone(model, [name], lambda _, n=n: model(input_ids=ids[n : n + 1]).logits[0])[0]
        torch.testing.assert_close(mixed[n], want, rtol=0, atol=1e-12)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default", "nobody"], r"'nobody', which is no loaded adapter. There are default, other, small, and __base__"),
        (["default"], "gives 1 names for an input with 2 samples"),
        (["default"] * 4, "gives 4 names for an input with 2 samples"),
        ([], "gives 0 names for an input with 2 samples"),
        ("default", "must be a list with one adapter's name per sample; got 'default'"),
        (["default", None], "must be a list with one adapter's name per sample"),
    ],
)
def test_wrong_names_are_refused_and_the_model_works_on(names, message):
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    before = model(x)
    with pytest.raises(ValueError, match=message):
        model(x, adapter_names=names)
    assert torch.equal(model(x), before)


def test_states_that_can_not_run_a_mixed_batch_are_refused():
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        model(x, adapter_names=["default", BASE])
    model.eval()
    model.merge_adapter(["small"])
    with pytest.raises(ValueError, match=r"while small is merged.*unmerge_adapter"):
        model(x, adapter_names=["default", BASE])
    model.unmerge_adapter()
    model(x, adapter_names=["default", BASE])
    with model.disable_adapter():  # as in PEFT's LoRA
        assert torch.equal(model(x, adapter_names=["default", "small"]), perceptron()(x))


@torch.no_grad()
def test_layers_that_are_switched_off_run_the_base_model():
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    layer = model.base_model.model.lin1
    layer.enable_adapters(False)
    mixed = model(x, adapter_names=["default", "other"])
    for n, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[n], model(x)[n])
    assert layer._disable_adapters


def test_wrong_names_in_generation_are_refused():
    model = language_model()
    with pytest.raises(ValueError, match="'nobody', which is no loaded adapter"):
        model.generate(input_ids=tokens(1), adapter_names=["nobody"], max_new_tokens=1)
    with pytest.raises(ValueError, match="gives 3 names for an input with 2 samples"):
        model.generate(input_ids=tokens(2), adapter_names=["small"] * 3, max_new_tokens=1)


# -- threads and compiled models ------------------------------------------------------------------------------------


def test_mixed_batches_may_run_in_several_threads():
    model = perceptron_with_three()
    x = torch.randn(3, 7)
    batches = [["default", "small", BASE], ["other", BASE, "default"], ["small", "small", "small"]]
    with torch.no_grad():
        want = [model(x, adapter_names=names) for names in batches]
        model(x)  # the active adapter is in the weights again
    problems = []

    def work(n):
        try:
            with torch.no_grad():
                for _ in range(40):
                    if not torch.equal(model(x, adapter_names=batches[n]), want[n]):
                        problems.append(n)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("make", [language_model, classifier])
def test_ordinary_passes_beside_mixed_batches_get_what_they_get_alone(make):
    model, ids = make(), tokens(3, 5)
    batches = [{}, {"adapter_names": ["default", "small", BASE]}, {"adapter_names": [BASE, "small", "default"]}]
    check_at_once([lambda names=names: model(input_ids=ids, **names).logits for names in batches])
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))


@torch.no_grad()
def test_threads_generate_with_their_own_adapters():
    model, ids = language_model(), tokens(2, 4)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batches = [{}, {"adapter_names": ["small", BASE]}, {"adapter_names": ["other", "default"], "num_beams": 2}]
    check_at_once([lambda names=names: model.generate(input_ids=ids, **settings, **names) for names in batches], 5)


@torch.no_grad()
def test_a_mixed_batch_that_raises_leaves_other_threads_alone():
    model, x = perceptron_with_three(), torch.randn(2, 7)
    want = model(x)

    def raises():
        with pytest.raises(ValueError, match="gives 3 names for an input with 2 samples"):
            model(x, adapter_names=["small"] * 3)
        return torch.zeros(1)

    check_at_once([lambda: model(x), raises])
    assert torch.equal(model(x), want)
    assert not entry_of(model.base_model.model).unwritten


@pytest.fixture
def fresh_dynamo():
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_inner_model_compiles_once_more_for_all_mixed_batches():
    model = perceptron_with_three()
    x = torch.randn(len(NAMES), 7)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        want = model(x, adapter_names=NAMES)
        ordinary = model(x)
        model.get_base_model().compile(backend=backend)
        torch.testing.assert_close(model(x), ordinary)
        assert len(graphs) == 1
        for _ in range(2):  # the adapted layers run outside of graphs
            torch.testing.assert_close(model(x, adapter_names=NAMES), want)
            torch.testing.assert_close(model(x), ordinary)
        count = len(graphs)
        for names in (list(reversed(NAMES)), NAMES):
            got = model(x, adapter_names=names)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(model(x), ordinary)
    assert len(graphs) == count


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_trains_on_mixed_batches_and_on_others():
    model = perceptron_with_three()
    x = torch.randn(2, 7)
    names = ["default", BASE]
    want = [g.clone() for g in torch.autograd.grad(model(x).square().sum(), deltas_of(model, "default"))]
    mixed = torch.autograd.grad(model(x, adapter_names=names).square().sum(), deltas_of(model, "default"))
    model.get_base_model().compile(backend="aot_eager")
    model(x)
    got = torch.autograd.grad(model(x, adapter_names=names).square().sum(), deltas_of(model, "default"))
    for g, w in zip(got, mixed, strict=True):
        torch.testing.assert_close(g, w)
    got = torch.autograd.grad(model(x).square().sum(), deltas_of(model, "default"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def deltas_of(model, name):
    return [layer.paca_delta[name] for layer in paca_layers(model) if name in layer.paca_delta]


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_a_compiled_peft_model_runs_mixed_batches():
    model = perceptron_with_three()
    x = torch.randn(len(NAMES), 7)
    others = list(reversed(NAMES))
    want = [model(x), model(x, adapter_names=NAMES), model(x, adapter_names=others), model(x)]
    compiled = torch.compile(model, backend="eager")
    got = [compiled(x), compiled(x, adapter_names=NAMES), compiled(x, adapter_names=others), compiled(x)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@torch.no_grad()
def test_a_copy_runs_mixed_batches_of_its_own():
    model = perceptron_with_three()
    x = torch.randn(len(NAMES), 7)
    want = model(x, adapter_names=NAMES)
    twin = copy.deepcopy(model)
    for layer in paca_layers(model):
        layer.paca_delta["default"].zero_()
    assert torch.equal(twin(x, adapter_names=NAMES), want)
    assert not torch.equal(model(x, adapter_names=NAMES), want)


BEGINNING_AND_END = ["mixed_batch", "running", "begin", "split_by_adapter", "_end", "end", "run_together"]
BEGINNING_AND_END += ["_take_out_hooks", "_enable_peft_forward_hooks", "__init__", "__enter__", "__exit__"]


@pytest.mark.slow(reason="tries many cases")
@torch.no_grad()
def test_ctrl_c_where_a_mixed_batch_begins_or_ends_changes_no_later_pass():
    """Also in `contextlib`, and where the exception stays, as it does in a notebook: nothing is freed then."""
    settings = {"target_modules": ["q_proj"], "target_parameters": STACKS, "modules_to_save": ["lm_head"]}
    model = adapt(mixtral("eager", num_hidden_layers=1), **settings, task_type="CAUSAL_LM")
    model.add_adapter("other", paca.PacaConfig(r=2, random_seed=3, init_weights=False, **settings))
    names, kept = ["default", BASE, "other"], []
    model, x = model.eval(), tokens(len(names), 4)
    hooks = [m._forward_pre_hooks.copy() for m in model.modules()]
    plain, mixed = model(x).logits, model(x, adapter_names=names).logits
    assert not torch.allclose(plain, mixed)
    for line in itertools.count(1, 3):
        with interrupted_at(line, BEGINNING_AND_END, (*FOLDERS, contextlib.__file__)) as report:
            try:
                model(x, adapter_names=names)
            except KeyboardInterrupt as stopped:
                kept.append(stopped)
                raise
        if report.where is None:
            break
        assert torch.equal(model(x).logits, plain), report.where
        assert not Running.batches, report.where
        assert [m._forward_pre_hooks for m in model.modules()] == hooks, report.where
        assert not any("forward" in vars(m) for m in model.modules()), report.where
        assert torch.equal(model(x, adapter_names=names).logits, mixed), report.where
    assert len(kept) > 20


@pytest.mark.parametrize("samples", [2, 5])
def test_another_model_that_is_called_within_a_mixed_batch_is_no_part_of_it(samples):
    """As a guide that scores what is generated, or a second model that a hook asks."""
    model, names = add_others(adapt(llama(num_hidden_layers=1), task_type="CAUSAL_LM")), ["small", BASE]
    other = adapt(llama(seed=1, num_hidden_layers=1), "elsewhere", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    x, theirs, found = tokens(2), tokens(samples, seed=3), []

    def gradients():
        other.zero_grad()
        other(input_ids=theirs).logits.square().sum().backward()
        return [p.grad for p in other.parameters() if p.grad is not None]

    want = gradients()
    want_mixed = model(input_ids=x, adapter_names=names).logits
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: found.append(gradients()))
    assert torch.equal(model(input_ids=x, adapter_names=names).logits, want_mixed)
    assert len(found[0]) == len(want) > 3
    assert all(map(torch.equal, found[0], want))


@torch.no_grad()
def test_a_mixed_batch_lasts_as_long_as_the_context_manager_that_holds_it():
    model, names, x = language_model(dtype=torch.float32), ["small", BASE], tokens(2)
    want = model(input_ids=x, adapter_names=names).logits

    @contextlib.contextmanager
    def ones_own():
        with model._enable_peft_forward_hooks(adapter_names=names):
            yield

    def opened():
        stack = contextlib.ExitStack()
        stack.enter_context(model._enable_peft_forward_hooks(adapter_names=names))
        return stack

    for held in (ones_own(), opened()):
        with held:
            assert torch.equal(model.base_model(input_ids=x).logits, want)
    assert not Running.batches


@torch.no_grad()
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_that_is_made_within_a_mixed_batch_over_experts_runs(duplicate):
    model = adapt(mixtral("eager", num_hidden_layers=1), target_parameters=STACKS, task_type="CAUSAL_LM").eval()
    x, names = tokens(2, 4), ["default", BASE]
    plain, mixed = model(x).logits, model(x, adapter_names=names).logits
    with model._enable_peft_forward_hooks(adapter_names=names):
        assert torch.equal(model.base_model(x).logits, mixed)
        twin = copy.deepcopy(model) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x).logits, plain)
    assert torch.equal(twin(x, adapter_names=names).logits, mixed)
    assert torch.equal(twin.unload()(x).logits, model.unload()(x).logits)


@pytest.mark.parametrize("kind", ["pre", "post", "both, with keywords"])
def test_hooks_on_the_stock_layer_run_around_each_samples_columns(kind):
    model = adapted_perceptron().eval()
    model.add_adapter("other", paca.PacaConfig(r=3, random_seed=1, init_weights=False, target_modules=["lin1"]))
    layer, seen = model.base_model.model.lin1.base_layer, []
    if kind != "post":
        layer.register_forward_pre_hook(lambda module, given, *_: (seen.append(module.weight), (given[0] * 3,))[1])
    if kind != "pre":
        with_keywords = "keywords" in kind
        layer.register_forward_hook(lambda module, *given: given[-1] * 2, with_kwargs=with_keywords)
    x, names = torch.randn(4, 7, requires_grad=True), ["default", BASE, "other", "default"]
    mixed = model(x, adapter_names=names)
    mixed.square().sum().backward()
    gradients = x.grad.clone()
    for n, name in enumerate(names):
        x.grad = None
        with model.disable_adapter() if name == BASE else contextlib.nullcontext():
            model.set_adapter("default" if name == BASE else name)
            alone = model(x[n : n + 1])
            torch.testing.assert_close(mixed[n], alone[0])
            alone.square().sum().backward()
        torch.testing.assert_close(gradients[n], x.grad[n])
    assert all(weight is layer.weight for weight in seen)


def test_a_hook_finds_its_module_in_a_table_of_modules():
    model = adapted_perceptron().eval()
    names, seen = {module: name for name, module in model.named_modules()}, {}
    for module in list(names):
        module.register_forward_hook(lambda module, given, output: seen.update({names[module]: output}))
    model(torch.randn(2, 7), adapter_names=["default", BASE])
    assert set(seen) >= {name for name in names.values() if name.endswith("base_layer")}

"""PaCA on stacks of experts: tiny models of three families, the three implementations of transformers' experts."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import paca
from expert_models import FAMILIES, IMPLEMENTATIONS, STACKS, gpt_oss, mixtral, qwen3_moe
from fresh_compiler import fresh_compiler  # noqa: F401
from models import adapt, base_state, llama, tokens
from paca.layers import PacaExpertStack, paca_layers
from reference import rounded_sum

everywhere = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
]


def in_every_implementation(test):
    for mark in everywhere:
        test = mark(test)
    return test


def adapted(family="mixtral", implementation="grouped_mm", dtype=torch.float32, **settings):
    settings = {"target_parameters": STACKS, "task_type": "CAUSAL_LM", **settings}
    return adapt(FAMILIES[family](implementation).to(dtype), **settings)


def stacks(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PacaExpertStack)}


def logits(model, batch=None):
    with torch.no_grad():
        return model(input_ids=tokens() if batch is None else batch).logits


def loss_of(model, batch=None):
    batch = tokens() if batch is None else batch
    return model(input_ids=batch, labels=batch).loss


def original(model, name):
    """A stack as pretrained, `(experts, out, in)`, from the model's state dict."""
    return out_by_in(model.state_dict()[f"{name}.base_layer"], stacks(model)[name])


def out_by_in(tensor, layer):
    return tensor if layer.base_layer.input_dim == -1 else tensor.mT


def dense_twin(model, family, names=("default",)):
    """The stock model in float64 with dense stacks that hold the adapters `names`; its stacks require grad."""
    twin = FAMILIES[family]("eager").double()
    places = dict(twin.named_parameters())
    for parameter in places.values():
        parameter.requires_grad_(False)
    for name, layer in stacks(model).items():
        place = places[name.removeprefix("base_model.model.")]
        adapters = [(layer.paca_delta[a], layer.paca_indices[a], layer.scaling[a]) for a in names]
        total = rounded_sum(original(model, name), adapters).double()
        place.data = out_by_in(total, layer).contiguous()
        place.requires_grad_()
    return twin


def check_against_the_twin(model, family, names=("default",), tolerance=1e-5):
    """Loss and gradients of the deltas against autograd through the dense stacks, in float64."""
    twin = dense_twin(model, family, names)
    want = loss_of(twin)
    want.backward()
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    assert abs(loss.item() - want.item()) < tolerance * 10
    places = dict(twin.named_parameters())
    for name, layer in stacks(model).items():
        dense = out_by_in(places[name.removeprefix("base_model.model.")].grad, layer)
        for adapter in names:
            gradient = layer.paca_delta[adapter].grad
            expected = layer.scaling[adapter] * dense[:, :, layer.paca_indices[adapter]]
            assert gradient.shape == expected.shape
            scale = expected.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * max(scale, 1e-3) * 10)


# -- numerics -------------------------------------------------------------------------------------------------------


@in_every_implementation
def test_loss_and_gradients_equal_a_dense_float64_model(family, implementation):
    check_against_the_twin(adapted(family, implementation), family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])  # torch's grouped kernel has no float64
def test_gradients_in_float64_agree_to_its_last_digits(family, implementation):
    check_against_the_twin(adapted(family, implementation, torch.float64), family, tolerance=1e-13)


@in_every_implementation
def test_gradients_in_bfloat16_agree_to_its_precision(family, implementation):
    model = adapted(family, implementation, torch.bfloat16)
    stock = FAMILIES[family](implementation).bfloat16()
    places = dict(stock.named_parameters())
    for name, layer in stacks(model).items():
        layer.write()
        places[name.removeprefix("base_model.model.")].data.copy_(layer.base_layer.weight)
    with torch.no_grad():
        routed = torch.equal(model(input_ids=tokens()).logits, stock(input_ids=tokens()).logits)
    assert routed or implementation == "batched_mm"  # which multiplies in another order
    loss_of(model).backward()
    loss_of(stock).backward()
    for name, layer in stacks(model).items():
        dense = out_by_in(places[name.removeprefix("base_model.model.")].grad, layer).float()
        want = layer.scaling["default"] * dense[:, :, layer.paca_indices["default"]]
        gradient = layer.paca_delta["default"].grad
        assert gradient.dtype == torch.float32
        error = (gradient - want).norm() / want.norm()
        assert error < (0.03 if implementation == "batched_mm" else 0.01), (name, error)


def test_experts_that_receive_no_token_get_zero_gradients():
    model = adapted("qwen3_moe", r=2)
    one = tokens(1, 2)
    loss_of(model, one).backward()
    for layer in stacks(model).values():
        gradient = layer.paca_delta["default"].grad
        idle = [e for e in range(8) if not bool(gradient[e].any())]
        assert 8 - 2 * 2 <= len(idle) < 8  # two tokens reach at most four of the eight
    twin = dense_twin(model, "qwen3_moe")
    loss_of(twin, one).backward()
    for name, layer in stacks(model).items():
        dense = dict(twin.named_parameters())[name.removeprefix("base_model.model.")].grad
        want = layer.scaling["default"] * dense[:, :, layer.paca_indices["default"]]
        torch.testing.assert_close(layer.paca_delta["default"].grad.double(), want, rtol=1e-4, atol=1e-7)


@in_every_implementation
def test_one_pass_with_and_without_gradients_gives_the_same_output(family, implementation):
    model = adapted(family, implementation)
    assert torch.equal(model(input_ids=tokens()).logits.detach(), logits(model))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_activation_checkpointing_changes_no_gradient(family, implementation, use_reentrant):
    plain, checkpointed = adapted(family, implementation), adapted(family, implementation)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        loss_of(model).backward()
    for one, other in zip(stacks(plain).values(), stacks(checkpointed).values(), strict=True):
        assert torch.equal(one.paca_delta["default"].grad, other.paca_delta["default"].grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_accumulate_over_passes_and_steps(implementation):
    model = adapted("mixtral", implementation)
    batches = [tokens(seed=1), tokens(seed=2)]
    apart = []
    for batch in batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        apart.append([s.paca_delta["default"].grad.clone() for s in stacks(model).values()])
    model.zero_grad()
    for batch in batches:
        loss_of(model, batch).backward()
    together = [s.paca_delta["default"].grad.clone() for s in stacks(model).values()]
    model.zero_grad()
    (loss_of(model, batches[0]) + loss_of(model, batches[1])).backward()
    for first, second, both, layer in zip(*apart, together, stacks(model).values(), strict=True):
        torch.testing.assert_close(both, first + second)
        torch.testing.assert_close(layer.paca_delta["default"].grad, first + second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_freezing_and_thawing_an_adapter_between_passes_is_seen(implementation):
    model = adapted("mixtral", implementation)
    for trainable in (True, False, True):
        model.zero_grad()
        for layer in stacks(model).values():
            layer.paca_delta["default"].requires_grad_(trainable)
        model.enable_input_require_grads()
        loss_of(model).backward()
        for layer in stacks(model).values():
            assert (layer.paca_delta["default"].grad is not None) is trainable


def test_autocast_trains_float32_stacks():
    model = adapted("mixtral", "eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    got = {n: s.paca_delta["default"].grad.clone() for n, s in stacks(model).items()}
    model.zero_grad()
    loss_of(model).backward()
    for name, layer in stacks(model).items():
        want = layer.paca_delta["default"].grad
        assert (got[name] - want).norm() / want.norm() < 0.05


@pytest.mark.slow(reason="compiles")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_experts_compute_the_same_over_steps_and_without_the_adapter():
    plain, other = (
        adapt(mixtral(num_hidden_layers=1).bfloat16(), target_parameters=STACKS, task_type="CAUSAL_LM")
        for _ in range(2)
    )
    other.get_base_model().model.layers[0].mlp.compile(backend="aot_eager")
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (plain, other)]
    for _ in range(2):
        losses = [loss_of(plain), loss_of(other)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for one, two in zip(stacks(plain).values(), stacks(other).values(), strict=True):
            assert torch.equal(one.paca_delta["default"], two.paca_delta["default"])
    with other.disable_adapter(), torch.no_grad():
        stock = mixtral(num_hidden_layers=1).bfloat16()
        assert torch.equal(logits(other), logits(stock))


# -- residence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_holds_the_sum_rounded_once(family, dtype):
    model = adapted(family, dtype=dtype)
    model.add_adapter("second", config(r=5, paca_alpha=10, random_seed=1, init_weights=False))
    names = ["default", "second"]
    model.base_model.set_adapter(names)
    logits(model)
    resident = {n: s.base_layer.weight.clone() for n, s in stacks(model).items()}
    for name, layer in stacks(model).items():
        adapters = [(layer.paca_delta[a], layer.paca_indices[a], layer.scaling[a]) for a in names]
        assert torch.equal(out_by_in(resident[name], layer), rounded_sum(original(model, name), adapters))
        assert not torch.equal(out_by_in(resident[name], layer), original(model, name))


def config(**settings):
    return paca.PacaConfig(**{"r": 3, "target_parameters": STACKS, "task_type": "CAUSAL_LM", **settings})


@in_every_implementation
def test_a_disabled_adapter_leaves_the_stock_model_bitwise(family, implementation):
    base = FAMILIES[family](implementation)
    want = logits(base)
    model = adapt(base, target_parameters=STACKS, task_type="CAUSAL_LM")
    active = logits(model)
    assert not torch.equal(active, want)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), active)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_dict_shows_the_pretrained_stacks_under_their_own_names_and_loads_again(implementation):
    base = mixtral(implementation)
    originals = {k: v.clone() for k, v in base.state_dict().items()}
    model = adapt(base, target_parameters=STACKS, task_type="CAUSAL_LM")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    shown = base_state(model)
    assert {k.removeprefix("model."): None for k in shown}.keys() >= {k.removeprefix("model.") for k in originals}
    for name, value in originals.items():
        assert torch.equal(shown[name], value)
    before = logits(model)
    state = model.state_dict()
    assert not model.load_state_dict(state).missing_keys
    assert torch.equal(logits(model), before)
    for name in list(state):
        if name.endswith("down_proj.base_layer"):
            state[name] = state[name] * 2
    model.load_state_dict(state)
    with model.disable_adapter():
        assert not torch.equal(logits(model), logits(mixtral(implementation)))
    incomplete = {k: v for k, v in state.items() if not k.endswith("0.mlp.experts.down_proj.base_layer")}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(incomplete)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_kept_state_dict_between_a_pass_and_its_backward_changes_no_gradient(implementation):
    model = adapted("mixtral", implementation, init_weights=False)
    deltas = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(loss_of(model), deltas)
    loss = loss_of(model)
    state = model.state_dict()  # the stacks move to a copy when the backward pass writes columns into them
    shown = {k: v.clone() for k, v in state.items()}
    for gradient, wanted in zip(torch.autograd.grad(loss, deltas), want, strict=True):
        assert torch.equal(gradient, wanted)
    assert all(torch.equal(state[k], v) for k, v in shown.items())


def test_a_state_dict_stays_the_pretrained_one_when_a_graph_from_before_is_dropped():
    model = adapted("mixtral", "eager", init_weights=False)
    loss = loss_of(model)  # its graph holds views of the stacks
    state = model.state_dict()
    shown = {k: v.clone() for k, v in state.items()}
    del loss
    logits(model)
    assert all(torch.equal(state[k], v) for k, v in shown.items())


def test_a_step_is_seen_by_the_next_pass_also_when_written_through_data():
    model = adapted("mixtral")
    for write in (
        lambda p: p.sub_(0.5 * p.grad),
        lambda p: p.data.sub_(0.5 * p.grad),
    ):
        loss_of(model).backward()
        with torch.no_grad():
            for layer in stacks(model).values():
                write(layer.paca_delta["default"])
        check_against_the_twin(model, "mixtral")


@in_every_implementation
def test_a_backward_uses_the_columns_of_its_forward(family, implementation):
    model = adapted(family, implementation)
    loss_of(model).backward()
    want = {n: s.paca_delta["default"].grad.clone() for n, s in stacks(model).items()}
    model.zero_grad()
    loss = loss_of(model)
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=tokens(seed=5))
    loss.backward()
    for name, layer in stacks(model).items():
        assert torch.equal(layer.paca_delta["default"].grad, want[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deltas_changed_between_forward_and_backward_raise(implementation):
    model = adapted("mixtral", implementation)
    loss = loss_of(model)
    with torch.no_grad():
        next(iter(stacks(model).values())).paca_delta["default"].add_(1)
    with pytest.raises(RuntimeError, match="were modified between forward and backward"):
        loss.backward()


def test_copies_and_pickles_hold_pretrained_stacks_and_work():
    model = adapted("mixtral", "eager")
    loss_of(model).backward()
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        with twin.disable_adapter():
            assert torch.equal(logits(twin), logits(mixtral("eager")))
        loss_of(twin).backward()
    moved = model.to(torch.bfloat16)
    assert all(s.base_layer.weight.dtype == torch.bfloat16 for s in stacks(moved).values())
    loss_of(moved).backward()


# -- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_two_adapters_are_switched_combined_and_trained(family, implementation):
    model = adapted(family, implementation)
    model.add_adapter("second", config(r=5, random_seed=1, init_weights=False))
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        check_against_the_twin(model, family, names)
    model.set_adapter("second")
    model.delete_adapter("default")
    check_against_the_twin(model, family, ["second"])


def test_adapters_may_target_different_stacks():
    model = adapted("mixtral", target_parameters=["experts.down_proj"])
    first = logits(model)
    model.add_adapter("second", config(target_parameters=["experts.gate_up_proj"], init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_modules_and_parameters_go_together_in_one_config():
    model = adapted("qwen3_moe", target_modules=["q_proj", "v_proj"])
    assert len(stacks(model)) == 4
    assert len(paca_layers(model)) == 8
    loss_of(model).backward()
    assert all(layer.paca_delta["default"].grad.abs().sum() > 0 for layer in paca_layers(model))
    assert model.base_model.targeted_parameter_names[0] == "model.layers.0.mlp.experts.gate_up_proj"


def test_modules_of_a_second_adapter_never_match_a_stack():
    model = adapt(qwen3_moe(mlp_only_layers=[1]), target_parameters=STACKS, task_type="CAUSAL_LM")
    model.add_adapter("second", paca.PacaConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert all("second" not in s.paca_delta for s in stacks(model).values())
    assert [n for n, m in model.named_modules() if "second" in getattr(m, "paca_delta", {})] == [
        "base_model.model.model.layers.1.mlp.down_proj"
    ]


def test_ranks_alphas_columns_blocks_and_exclusions_apply_to_stacks():
    model = adapted(
        "mixtral",
        r=4,
        paca_alpha=8,
        rank_pattern={"gate_up_proj": 2},
        alpha_pattern={"down_proj": 4.0},
        indices={"layers.1.mlp.experts.down_proj": [40, 3, 11]},
        target_modules=["q_proj"],
    )
    found = {n.split("layers.")[1]: s for n, s in stacks(model).items()}
    assert found["0.mlp.experts.gate_up_proj"].r["default"] == 2
    assert found["0.mlp.experts.down_proj"].scaling["default"] == 1.0
    assert found["1.mlp.experts.down_proj"].paca_indices["default"].tolist() == [3, 11, 40]
    assert found["1.mlp.experts.down_proj"].paca_delta["default"].shape == (4, 64, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert len(stacks(adapted("mixtral", layers_to_transform=[1], rank_pattern={"gate_up_proj": 2}))) == 2
    with pytest.warns(UserWarning, match=r"no adapted layer is called \['up_proj'\]"):
        adapted("mixtral", rank_pattern={"up_proj": 2, "gate_up_proj": 2})
    assert len(stacks(adapted("mixtral", exclude_modules=["down_proj"]))) == 2


@in_every_implementation
def test_merging_and_unmerging(family, implementation):
    model = adapted(family, implementation)
    originals = base_state(model)
    want = logits(model)
    model.merge_adapter(safe_merge=True)
    merged = logits(model)
    assert torch.equal(merged, want) or implementation == "batched_mm"  # whose stock kernel sums in another order
    torch.testing.assert_close(merged, want)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload_leaves_a_stock_model_that_saves_and_loads(family, tmp_path):
    base = FAMILIES[family]()
    names, kinds = list(base.state_dict()), {type(m) for m in base.modules()}
    model = adapt(base, target_parameters=STACKS, task_type="CAUSAL_LM")
    want = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert merged is base
    assert list(merged.state_dict()) == names
    assert {type(m) for m in merged.modules()} == kinds
    assert torch.equal(logits(merged), want)
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path, experts_implementation="grouped_mm", dtype=torch.float32)
    assert torch.equal(logits(again), want)


def test_unload_restores_the_model_bitwise():
    base = gpt_oss()
    originals = {k: v.clone() for k, v in base.state_dict().items()}
    model = adapt(base, target_parameters=STACKS, task_type="CAUSAL_LM")
    loss_of(model).backward()
    plain = model.unload()
    assert list(plain.state_dict()) == list(originals)
    assert all(torch.equal(v, originals[k]) for k, v in plain.state_dict().items())


def test_the_delta_weight_is_the_difference_of_the_merged_stack():
    for family in ("mixtral", "gpt_oss"):
        model = adapted(family, "eager", torch.float64)
        for name, layer in stacks(model).items():
            before = model.state_dict()[f"{name}.base_layer"].clone()
            layer.merge()
            torch.testing.assert_close(layer.base_layer.weight - before, layer.get_delta_weight("default"))


def test_generation_uses_the_adapter():
    model = adapted("mixtral", "batched_mm", paca_alpha=60)
    prompt = {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 6, "do_sample": False}
    with_adapter = model.generate(**prompt, **settings)
    with model.disable_adapter():
        assert torch.equal(model.generate(**prompt, **settings), mixtral("batched_mm").generate(**prompt, **settings))
    assert torch.equal(model.merge_and_unload().generate(**prompt, **settings), with_adapter)


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = adapted("mixtral", init_weights=True, r=8, paca_alpha=8)
    originals = base_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(25):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(v, originals[k]) for k, v in base_state(model).items())


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading_gives_the_same_model(family, low_cpu_mem_usage, tmp_path):
    model = adapted(family, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    experts = model.config.num_local_experts
    prefix = "base_model.model.model.layers.1.mlp.experts."
    assert tensors[prefix + "down_proj.paca_delta"].shape == (experts, 64, 3)
    assert tensors[prefix + "down_proj.paca_indices"].shape == (3,)
    assert len(tensors) == 2 * (4 + 2)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_parameters"] == STACKS
    again = PeftModel.from_pretrained(FAMILIES[family](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    again.load_adapter(tmp_path, "beside")
    again.set_adapter("beside")
    assert torch.equal(logits(again), logits(model))


NAME = "base_model.model.model.layers.1.mlp.experts.down_proj."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({NAME + "paca_delta": torch.zeros(3, 64, 3)}),
            r"down_proj\.paca_delta has shape \(3, 64, 3\)",
        ),
        (lambda t: t.update({NAME + "paca_delta": torch.zeros(64, 3)}), r"must have \(4, 64, 3\) \(experts, out_f"),
        (lambda t: t.update({NAME + "paca_indices": torch.tensor([1, 2, 48])}), "column 48 is out of range"),
        (lambda t: t[NAME + "paca_delta"].view(-1)[:1].fill_(float("nan")), "holds NaN or Inf"),
        (lambda t: t.pop(NAME + "paca_indices"), "no tensor .*down_proj.paca_indices"),
    ],
)
def test_a_broken_adapter_is_refused_and_leaves_the_stock_model(change, message, tmp_path):
    adapted("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = mixtral()
    names = [n for n, _ in base.named_parameters()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert [n for n, _ in base.named_parameters()] == names
    assert all(p.requires_grad for p in base.parameters())
    assert torch.equal(logits(base), logits(mixtral()))


def test_unsorted_columns_of_another_tool_are_sorted_on_loading(tmp_path):
    model = adapted("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    order = torch.tensor([2, 0, 1])
    for name in [n for n in tensors if n.endswith("paca_indices")]:
        delta = name.replace("paca_indices", "paca_delta")
        tensors[name], tensors[delta] = tensors[name][order].contiguous(), tensors[delta][..., order].contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(mixtral(), tmp_path)), logits(model))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            mixtral,
            {"target_parameters": ["experts.gate_up"]},
            "parameter 'experts.gate_up'. Did you mean 'gate_up_proj'",
        ),
        (
            mixtral,
            {"target_parameters": [*STACKS, "nothing"]},
            "parameter 'nothing'. .*called down_proj, gate_up_proj",
        ),
        (mixtral, {"target_parameters": ["q_proj.weight"]}, r"q_proj.weight has shape \(64, 64\), .* target_modules"),
        (gpt_oss, {"target_parameters": ["down_proj_bias"]}, r"down_proj_bias has shape \(4, 64\)"),
        (llama, {"target_parameters": STACKS}, "no stacks of experts at all"),
        (mixtral, {"target_parameters": STACKS, "exclude_modules": ["gate_up_proj", "down_proj"]}, "leave none of"),
        (
            mixtral,
            {"target_parameters": STACKS, "r": 49},
            "down_proj: r=49 columns were asked for, .* 48 input",
        ),
        (mixtral, {"target_parameters": "experts.down_proj"}, "target_parameters must be a list of names"),
        (
            mixtral,
            {"target_parameters": STACKS, "indices": {"down_proj": [48]}},
            "down_proj: column 48 is out of range",
        ),
    ],
)
def test_what_can_not_be_adapted_is_refused_and_leaves_the_model_as_it_was(make, settings, message):
    base = make()
    names, kinds = [n for n, _ in base.named_parameters()], {type(m) for m in base.modules()}
    with pytest.raises(ValueError, match=message):
        adapt(base, **settings)
    assert [n for n, _ in base.named_parameters()] == names
    assert {type(m) for m in base.modules()} == kinds
    assert all(p.requires_grad for p in base.parameters())


def test_a_stack_whose_experts_do_not_say_how_it_is_stored_is_refused():
    base = mixtral()
    del base.model.layers[0].mlp.experts.is_transposed
    with pytest.raises(ValueError, match="takes no part in transformers' experts interface"):
        adapt(base, target_parameters=STACKS)


def test_experts_kernels_that_can_not_be_trained_through_are_refused():
    base = mixtral()
    base.config._experts_implementation_internal = "sonicmoe"
    with pytest.raises(ValueError, match="experts_implementation='sonicmoe'"):
        adapt(base, target_parameters=STACKS)


def test_an_operation_that_would_lose_the_columns_is_refused():
    layer = next(iter(stacks(adapted("mixtral")).values()))
    x = torch.randn(4, 64)
    for use in (
        lambda: torch.einsum("ti,eoi->teo", x, layer),
        lambda: x @ layer[0],
        lambda: torch.nn.functional.linear(x, layer.transpose(-2, -1)),
        lambda: layer[0:2],
        lambda: layer.transpose(0, 1),
        lambda: layer[0][0],
        lambda: torch.bmm(layer[torch.tensor([0, 1])], torch.randn(2, 64, 3)),
    ):
        with pytest.raises(ValueError, match="which PaCA can't train columns through"):
            use()


# -- memory ---------------------------------------------------------------------------------------------------------


class LargestAllocation(TorchDispatchMode):
    """Notes the largest storage, in bytes, that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage.nbytes() > self.bytes:
                self.bytes, self.operation = storage.nbytes(), func
        return result


def largest_allocation_of_a_step(model):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for measured in (False, True):  # the first step makes the optimizer's state
        with LargestAllocation() if measured else torch.enable_grad() as largest:
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            logits(model)  # refreshes
    return largest


@in_every_implementation
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_nothing_of_a_stacks_size_is_allocated_in_a_step(family, implementation, checkpointing):
    model = adapted(family, implementation)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    smallest = min(s.base_layer.weight.nbytes for s in stacks(model).values())
    largest = largest_allocation_of_a_step(model)
    assert 0 < largest.bytes < smallest / 2, largest.operation


def test_a_refresh_of_many_stacks_together_allocates_nothing_of_ones_size():
    model = adapt(mixtral(num_hidden_layers=16), target_parameters=STACKS, task_type="CAUSAL_LM")
    smallest = min(s.base_layer.weight.nbytes for s in stacks(model).values())
    with LargestAllocation() as largest:
        paca.refresh(model)
    assert 0 < largest.bytes < smallest / 2, largest.operation


def test_that_measurement_sees_the_stacks_that_lora_makes():
    lora = peft.LoraConfig(r=3, target_parameters=STACKS, target_modules=[], task_type="CAUSAL_LM")
    largest = largest_allocation_of_a_step(peft.get_peft_model(mixtral(), lora))
    assert largest.bytes >= 4 * 96 * 64 * 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_an_experts_input_only_the_selected_columns_are_kept(implementation):
    model = adapted("mixtral", implementation, r=3, target_parameters=["experts.gate_up_proj"])
    layer = next(iter(stacks(model).values()))
    x = torch.randn(6, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if implementation == "eager":
            torch.nn.functional.linear(x, layer[2])
        elif implementation == "batched_mm":
            torch.bmm(layer[torch.tensor([0, 3, 3, 1, 0, 2])], x[..., None])
        else:
            torch._grouped_mm(x, layer.transpose(-2, -1), offs=torch.tensor([1, 2, 2, 6], dtype=torch.int32))
    floats = [t for t in kept if t.is_floating_point()]
    assert floats
    assert sum(t.shape[0] for t in floats) == 6
    assert all(t.shape[1] == 3 for t in floats)


def test_a_stack_runs_the_stock_code_only_where_no_thread_may_write_columns():
    """Else a mixed batch of another thread could write into the plain weight in the middle of a pass."""
    model = adapt(mixtral("eager"), target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {"target_parameters": STACKS, "task_type": "CAUSAL_LM", "init_weights": False}
    model.add_adapter("other", paca.PacaConfig(r=4, **settings))
    stack = next(iter(stacks(model).values()))
    with torch.no_grad():
        assert not stack.base_layer.columns.state.columns
        assert not isinstance(stack(), torch.Tensor)
        with model.disable_adapter():
            assert isinstance(stack(), torch.Tensor)

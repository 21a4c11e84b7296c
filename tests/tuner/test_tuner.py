"""PaCA as PEFT's users know any other method."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import paca
from models import adapt, adapted_perceptron, base_state, gpt2, llama, perceptron, tokens
from paca.layers import PacaLinear, paca_layers

ADAPTER = "adapter_model.safetensors"


def stock_classes(model):
    return {type(m) for m in model.modules()}


def step(model, x=None):
    x = torch.randn(4, 7) if x is None else x
    loss = model(x).square().sum()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.grad is not None:
                p.sub_(0.05 * p.grad)
                p.grad = None
    return loss.item()


# -- putting in -----------------------------------------------------------------------------------------------------


def test_the_default_targets_all_linear_layers_but_the_head():
    model = adapt(llama(), task_type="CAUSAL_LM")
    names = {n.split("model.", 3)[-1] for n, m in model.named_modules() if isinstance(m, PacaLinear)}
    want = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    want |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert names == {f"layers.{i}.{n}" for i in range(2) for n in want}
    assert len(paca_layers(adapt(gpt2(), task_type="CAUSAL_LM"))) == 8


@pytest.mark.parametrize(
    ("made", "task", "head"),
    [
        (transformers.BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (transformers.BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (transformers.BertForSequenceClassification, "SEQ_CLS", "classifier"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [0, 1]}])
def test_a_head_that_peft_trains_whole_is_not_among_all_linear_layers(made, task, head, settings, tmp_path):
    """PEFT says which it is only when the adapter is in, and failed then (it does with LoRA's "all-linear")."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = made(transformers.BertConfig(vocab_size=100, **shape)).eval()
    model = adapt(copy.deepcopy(base), task_type=task, r=3, init_weights=False, **settings).eval()
    assert len(paca_layers(model)) == 12 + (task == "SEQ_CLS" and not settings)  # the pooler
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ".paca_delta." not in name}
    assert whole == {f"base_model.model.{head}.modules_to_save.default.{tensor}" for tensor in ("weight", "bias")}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(input_ids=tokens())[0], model(input_ids=tokens())[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_second_call_of_get_peft_model_says_that_there_is_an_adapter(tied):
    model = adapt(llama(tie_word_embeddings=tied))
    before = model(input_ids=tokens()).logits
    said = pytest.raises(ValueError, match=r"has a PaCA adapter already \('default'\)")
    with pytest.warns(UserWarning, match="second time"), said:
        adapt(model)
    assert torch.equal(model(input_ids=tokens()).logits, before)
    assert len(paca_layers(model)) == 14
    model.add_adapter("other", paca.PacaConfig(r=2))  # the ways out that it names
    assert len(paca_layers(adapt(model.unload()))) == 14


def test_only_the_deltas_are_trainable_and_they_are_counted(capsys):
    model = adapt(llama(), r=3)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".paca_delta." in n and p.dtype == torch.float32 for n, p in trainable.items())
    total = sum(p.numel() for p in trainable.values())
    assert model.get_nb_trainable_parameters()[0] == total == 3 * 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    model.print_trainable_parameters()
    assert f"trainable params: {total:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"target_modules": ["q_proj"]}, 2),
        ({"target_modules": r".*\.1\..*\.(up|down)_proj"}, 2),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]}, 10),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, 2),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, 1),
        ({"layers_to_transform": [1]}, 7),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, 7),
    ],
)
def test_targets(settings, adapted):
    assert len(paca_layers(adapt(llama(), **settings))) == adapted


@pytest.mark.parametrize(("numbers", "missing"), [([1, 2, 7], "2, 7"), ([-1, 0], "-1"), ([0, 1], None), (1, None)])
def test_blocks_that_the_model_does_not_have_are_told(numbers, missing):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapt(llama(), target_modules=["q_proj"], layers_to_transform=numbers)
    found = [str(one.message) for one in told if "layers_to_transform" in str(one.message)]
    there = "0" if missing == "-1" else "1"
    expected = f"blocks of which no layer is adapted: {missing}. There are adapted layers in {there} (blocks are"
    assert [expected in one for one in found] == ([True] if missing else [])


def test_ranks_alphas_and_columns_of_particular_layers():
    model = adapt(
        llama(),
        r=4,
        paca_alpha=8,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 5},
        alpha_pattern={"k_proj": 1.0},
        indices={"layers.0.mlp.up_proj": [7, 0, 31]},
    )
    layers = {n.split("layers.")[-1]: m for n, m in model.named_modules() if isinstance(m, PacaLinear)}
    assert layers["0.self_attn.q_proj"].r["default"] == 2
    assert layers["1.self_attn.v_proj"].r["default"] == 5
    assert layers["0.self_attn.k_proj"].scaling["default"] == 1.0 / 4
    assert layers["0.self_attn.v_proj"].scaling["default"] == 2.0
    assert layers["0.mlp.up_proj"].paca_indices["default"].tolist() == [0, 7, 31]
    assert layers["0.mlp.up_proj"].paca_delta["default"].shape == (48, 3)


def test_columns_given_by_hand_target_their_modules():
    model = adapt(llama(), indices={"q_proj": [0], "v_proj": [1, 2]})
    assert len(paca_layers(model)) == 4


def test_the_columns_do_not_depend_on_what_else_is_adapted():
    whole = dict(adapt(llama()).named_buffers())
    part = dict(adapt(llama(), target_modules=["up_proj"]).named_buffers())
    ours = {k: v for k, v in part.items() if "paca_indices" in k}
    assert ours
    for name, indices in ours.items():
        assert torch.equal(whole[name], indices)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (llama, {"target_modules": ["nothing"]}, "it has no module named nothing"),
        (llama, {"r": 33}, "r=33 columns were asked for, but this layer has 32 input columns"),
        (llama, {"target_modules": ["q_proj", "input_layernorm"]}, "input_layernorm is a .*LlamaRMSNorm, which PaCA"),
        (llama, {"target_modules": ["q_proj", "act_fn"]}, "act_fn is a .*can't adapt yet"),
        (llama, {"indices": {"q_proj": [32]}}, "q_proj: column 32 is out of range"),
        (
            lambda: llama(tie_word_embeddings=True),
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head shares its weight with another module",
        ),
    ],
)
def test_what_can_not_be_adapted_is_refused_and_leaves_the_model_as_it_was(model, settings, message):
    base = model()
    classes, names = stock_classes(base), [n for n, _ in base.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            adapt(base, **settings)
    assert stock_classes(base) == classes
    assert [n for n, _ in base.named_parameters()] == names
    assert all(p.requires_grad for p in base.parameters())
    assert not base._forward_pre_hooks
    adapt(base, target_modules=["q_proj"])  # and it can still be adapted


def test_a_layer_of_another_method_is_refused():
    model = peft.get_peft_model(perceptron(), peft.LoraConfig(target_modules=["lin1"]))
    with pytest.raises(ValueError, match="already adapted by another method"):
        adapt(model.base_model.model, target_modules=["lin1"])


@pytest.mark.filterwarnings("ignore:You are trying", "ignore:Already found")
def test_columns_below_an_adapter_of_another_method_are_merged_by_themselves():
    """LoRA's merge writes into columns, through `.data`, and theirs would put the originals over it."""
    inner = adapt(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), target_modules=["0", "2"])
    lora = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    outer, x = peft.get_peft_model(inner, lora).eval(), torch.randn(3, 16)
    want = outer(x)
    for model in (outer, inner):
        with pytest.raises(RuntimeError, match=r"another method.*unmerge_adapter\(\), then merge\(\) of each"):
            model.merge_adapter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not merged
            outer.unmerge_adapter()
        torch.testing.assert_close(outer(x), want)
    for layer in paca_layers(outer):
        layer.merge()
    outer.merge_adapter()
    torch.testing.assert_close(outer(x), want)
    outer.unmerge_adapter()
    torch.testing.assert_close(outer(x), want)


@pytest.mark.filterwarnings("ignore:You are trying", "ignore:Already found")
def test_other_layers_of_another_method_are_merged_at_once():
    inner = adapt(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), target_modules=["0"])
    outer = peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["2"], init_lora_weights=False)).eval()
    x = torch.randn(3, 16)
    want = outer(x)
    for model in (outer, inner):
        model.merge_adapter()
        torch.testing.assert_close(outer(x), want)
        outer.unmerge_adapter()
        torch.testing.assert_close(outer(x), want)


@pytest.mark.filterwarnings("ignore:You are trying", "ignore:Already found")
def test_a_mixed_model_above_columns_merges_them_neither():
    inner = adapt(nn.Sequential(nn.Linear(16, 16)), target_modules=["0"])
    outer = peft.PeftMixedModel(inner, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), "default")
    with pytest.raises(RuntimeError, match="another method"):
        outer.merge_adapter()


def test_deltas_keep_the_weights_dtype_when_peft_is_told_not_to_cast():
    config = paca.PacaConfig(r=2, target_modules=["lin1"])
    model = peft.get_peft_model(perceptron(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert model.base_model.model.lin1.paca_delta["default"].dtype == torch.bfloat16
    model = peft.get_peft_model(perceptron(dtype=torch.bfloat16), paca.PacaConfig(r=2, target_modules=["lin1"]))
    assert model.base_model.model.lin1.paca_delta["default"].dtype == torch.float32


# -- several adapters -----------------------------------------------------------------------------------------------


def two_adapters():
    model = adapted_perceptron()
    model.add_adapter(
        "second", paca.PacaConfig(r=5, init_weights=False, random_seed=1, target_modules=["lin1", "lin2"])
    )
    return model


def output_of(model, names, x):
    """The output with the adapters `names`, from dense weights."""
    h = x
    for name in ("lin1", "lin2"):
        layer = model.base_model.model.get_submodule(name)
        weight = layer.base_layer.state_dict()["weight"].clone()
        for adapter in names:
            weight += layer.get_delta_weight(adapter)
        h = nn.functional.linear(h, weight, layer.base_layer.bias)
        h = torch.tanh(h) if name == "lin1" else h
    return h


def test_adapters_can_be_switched_combined_and_deleted():
    model = two_adapters()
    x = torch.randn(4, 7)
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        want = output_of(model, names, x)
        model.base_model.set_adapter(names)
        torch.testing.assert_close(model(x), want)
        assert model.active_adapters == names
    model.set_adapter("second")
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), output_of(model, ["second"], x))
    assert model.get_model_status().available_adapters == ["second"]
    model.add_adapter("third", paca.PacaConfig(r=1, init_weights=False, target_modules=["lin1", "lin2"]))
    with pytest.warns(UserWarning, match="Setting active adapter to third"):
        model.delete_adapter("second")
    torch.testing.assert_close(model(x), output_of(model, ["third"], x))
    model.delete_adapter("third")
    assert torch.equal(model.base_model(x), perceptron()(x))


def test_only_the_active_adapter_trains():
    model = two_adapters()
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.set_adapter("second")
    step(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and "base_layer" not in n}
    assert changed == {n for n in before if n.endswith("paca_delta.second")}


def test_adapters_with_different_targets():
    model = adapted_perceptron(target_modules=["lin1"])
    model.add_adapter("second", paca.PacaConfig(r=2, init_weights=False, target_modules=["lin2"]))
    x = torch.randn(4, 7)
    first = model(x)
    model.set_adapter("second")
    second = model(x)
    base = perceptron()(x)
    assert not torch.equal(first, second)
    assert not torch.equal(second, base)
    step(model, x)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first)


# -- status ---------------------------------------------------------------------------------------------------------


def test_model_and_layer_status():
    model = two_adapters()
    status = model.get_model_status()
    assert status.peft_types == {"default": "PACA", "second": "PACA"}
    assert status.num_adapter_layers == 2
    assert status.requires_grad == {"default": True, "second": False}
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.merged_adapters == []
    assert [layer.name for layer in model.get_layer_status()] == ["model.lin1", "model.lin2"]
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# -- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_and_unmerging_are_bitwise(dtype, kind):
    model = adapted_perceptron(kind, dtype)
    x = torch.randn(4, 7, dtype=dtype)
    y = model(x)
    originals = base_state(model)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


def test_adapters_are_merged_one_after_another_and_together():
    model = two_adapters()
    x = torch.randn(4, 7)
    model.base_model.set_adapter(["default", "second"])
    y = model(x)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), perceptron()(x))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_unload_leaves_a_stock_model(make, safe_merge):
    base = make()
    classes = stock_classes(base)
    model = adapt(base, task_type="CAUSAL_LM")
    with torch.no_grad():
        want = model(input_ids=tokens()).logits
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged is base
    assert stock_classes(merged) == classes
    assert not merged._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(merged(input_ids=tokens()).logits, want)
    assert set(merged.state_dict()) == set(make().state_dict())


def test_unload_restores_the_model_bitwise():
    base = llama()
    originals = {k: v.clone() for k, v in base.state_dict().items()}
    classes = stock_classes(base)
    model = adapt(base, task_type="CAUSAL_LM")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    unloaded = model.unload()
    assert stock_classes(unloaded) == classes
    for name, value in unloaded.state_dict().items():
        assert torch.equal(value, originals[name])


@pytest.mark.parametrize("unload", [False, True])
def test_a_safe_merge_refuses_a_broken_adapter_and_merges_nothing(unload):
    model = adapted_perceptron()
    originals = base_state(model)
    model.base_model.model.lin2.paca_delta["default"].data[0, 0] = float("inf")  # the last layer
    with pytest.raises(ValueError, match="'default' holds NaN or Inf in lin2, so nothing was merged"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in paca_layers(model))
    assert len(paca_layers(model)) == 2
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_safe_merge_that_overflows_in_a_later_layer_takes_the_earlier_ones_back(unload, merged_before):
    model = adapted_perceptron(dtype=torch.float16)
    model.add_adapter("other", paca.PacaConfig(r=2, target_modules=["lin1", "lin2"], init_weights=False))
    if merged_before:
        model.merge_adapter(["other"])
    model.base_model.model.lin2.paca_delta["default"].data[0, 0] = 1e6  # finite, but not in float16
    paca.refresh(model)
    before = [layer.base_layer.weight.clone() for layer in paca_layers(model)]
    with pytest.raises(ValueError, match="NaN or Inf into the weight, so nothing was merged"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert [layer.merged_adapters for layer in paca_layers(model)] == [["other"] if merged_before else []] * 2
    for layer, weight in zip(paca_layers(model), before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)


# -- saving and loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A trained adapter of the tiny Llama, its folder and its logits."""
    model = adapt(llama(), task_type="CAUSAL_LM", r=3)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(input_ids=tokens()).logits


def test_the_saved_format(saved):
    folder, _ = saved
    tensors = load_file(folder / ADAPTER)
    prefix = "base_model.model.model.layers.0.mlp.up_proj."
    assert tensors[prefix + "paca_delta"].shape == (48, 3)
    assert tensors[prefix + "paca_delta"].dtype == torch.float32
    indices = tensors[prefix + "paca_indices"]
    assert indices.shape == (3,)
    assert indices.dtype == torch.int64
    assert bool((indices[1:] > indices[:-1]).all())
    assert len(tensors) == 2 * 14
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PACA"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_from_pretrained_gives_the_same_model(saved, low_cpu_mem_usage, is_trainable):
    folder, want = saved
    model = PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, want)
    assert any(p.requires_grad for p in model.parameters()) is is_trainable
    if is_trainable:
        model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_low_cpu_mem_usage_keeps_float32_deltas_on_half_precision_weights(saved):
    folder, _ = saved
    model = PeftModel.from_pretrained(llama().bfloat16(), folder, low_cpu_mem_usage=True)
    layer = paca_layers(model)[0]
    assert layer.paca_delta["default"].dtype == torch.float32
    stored = load_file(folder / ADAPTER)
    name = next(n for n, m in model.named_modules() if m is layer)
    assert torch.equal(layer.paca_delta["default"], stored[f"{name}.paca_delta"])


def test_auto_peft_model_finds_its_base(saved, tmp_path):
    folder, want = saved
    llama().save_pretrained(tmp_path / "base")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, want)


def test_a_second_adapter_is_loaded_beside_the_first(saved):
    folder, want = saved
    model = adapt(llama(), task_type="CAUSAL_LM", r=2, random_seed=4)
    model.load_adapter(folder, "loaded")
    with torch.no_grad():
        first = model(input_ids=tokens()).logits
        model.set_adapter("loaded")
        assert torch.equal(model(input_ids=tokens()).logits, want)
        model.set_adapter("default")
        assert torch.equal(model(input_ids=tokens()).logits, first)


def test_an_adapter_is_loaded_over_itself_as_the_trainer_does_on_resume(saved):
    folder, want = saved
    model = adapt(llama(), task_type="CAUSAL_LM", r=3, random_seed=123)
    model(input_ids=tokens())
    model.load_adapter(folder, "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, want)


@pytest.mark.parametrize("through", ["peft", "transformers"])
def test_injection_without_a_peft_model(saved, through):
    folder, want = saved
    model = llama()
    if through == "transformers":
        if Version(peft.__version__) < Version("0.22"):
            pytest.skip("transformers' own adapter methods ask for PEFT >= 0.22")
        model.load_adapter(str(folder))
    else:
        peft.inject_adapter_in_model(paca.PacaConfig.from_pretrained(folder), model)
        peft.set_peft_model_state_dict(model, load_file(folder / ADAPTER))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, want)
    stored = peft.get_peft_model_state_dict(model)
    for name, tensor in load_file(folder / ADAPTER).items():
        assert torch.equal(stored[name.removeprefix("base_model.model.")], tensor)


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = adapt(perceptron(), target_modules=["lin1"], modules_to_save=["lin2"])
    x = torch.randn(4, 7)
    before = model.base_model.model.lin2.modules_to_save["default"].weight.clone()
    step(model, x)
    assert not torch.equal(model.base_model.model.lin2.modules_to_save["default"].weight, before)
    want = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(perceptron(), tmp_path)
    assert torch.equal(loaded(x), want)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), perceptron()(x))
    assert torch.equal(loaded.merge_and_unload()(x), want)


def test_unsorted_columns_of_another_tool_are_sorted_on_loading(saved):
    folder, want = saved
    tensors = load_file(folder / ADAPTER)
    order = torch.tensor([2, 0, 1])
    for name in [n for n in tensors if n.endswith("paca_indices")]:
        delta = name.replace("paca_indices", "paca_delta")
        tensors[name], tensors[delta] = tensors[name][order].contiguous(), tensors[delta][:, order].contiguous()
    save_file(tensors, folder / ADAPTER)
    model = PeftModel.from_pretrained(llama(), folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, want)
    indices = paca_layers(model)[0].paca_indices["default"]
    assert bool((indices[1:] > indices[:-1]).all())


NAME = "base_model.model.model.layers.1.mlp.down_proj."


def _without(name):
    return lambda t: t.pop(NAME + name)


def _with(name, change):
    def apply(tensors):
        tensors[NAME + name] = change(tensors[NAME + name].clone())

    return apply


def _first(value):
    def change(t):
        t.view(-1)[0] = value
        return t

    return change


BROKEN = {
    "unknown target": (
        lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.paca_delta": torch.zeros(48, 3)}),
        r"layers\.9\.mlp\.up_proj\.paca_delta.*no such layer",
    ),
    "a weight of the base": (
        lambda t: t.update({"base_model.model.model.layers.1.mlp.down_proj.base_layer.weight": torch.zeros(32, 48)}),
        r"down_proj\.base_layer\.weight.*no such layer",
    ),
    "a norm of the base": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
        r"model\.norm\.weight.*no such layer",
    ),
    "missing delta": (_without("paca_delta"), r"no tensor .*down_proj\.paca_delta"),
    "missing indices": (_without("paca_indices"), r"no tensor .*down_proj\.paca_indices"),
    "wrong rows": (
        _with("paca_delta", lambda d: d[:-1].contiguous()),
        r"down_proj\.paca_delta has shape \(31, 3\).*\(32, 3\)",
    ),
    "wrong rank": (_with("paca_delta", lambda d: d[:, :2].contiguous()), r"down_proj\.paca_delta has shape \(32, 2\)"),
    "too few indices": (
        _with("paca_indices", lambda i: i[:2].contiguous()),
        r"down_proj\.paca_indices has shape \(2,\)",
    ),
    "index out of range": (
        _with("paca_indices", lambda i: i + 46),
        r"down_proj\.paca_indices: column \d+ is out of range",
    ),
    "negative index": (_with("paca_indices", _first(-1)), r"down_proj\.paca_indices: column -1 is out of range"),
    "repeated index": (
        _with("paca_indices", lambda i: i[:1].repeat(3)),
        r"down_proj\.paca_indices: column \d+ is named more",
    ),
    "float indices": (_with("paca_indices", lambda i: i.float()), r"down_proj\.paca_indices is torch.float32"),
    "integer delta": (_with("paca_delta", lambda d: d.long()), r"down_proj\.paca_delta is torch.int64"),
    "nan": (_with("paca_delta", _first(float("nan"))), r"down_proj\.paca_delta holds NaN or Inf"),
    "inf": (_with("paca_delta", _first(float("-inf"))), r"down_proj\.paca_delta holds NaN or Inf"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("how", ["from_pretrained", "trainable", "low_cpu", "beside another", "over itself"])
def test_a_broken_adapter_is_refused_by_name_and_leaves_the_model_as_it_was(saved, case, how):
    folder, _ = saved
    breaking, message = BROKEN[case]
    tensors = load_file(folder / ADAPTER)
    breaking(tensors)
    save_file(tensors, folder / ADAPTER)
    base = llama()
    classes, names = stock_classes(base), [n for n, _ in base.named_parameters()]
    base.lm_head.weight.requires_grad_(False)
    if how in ("from_pretrained", "trainable", "low_cpu"):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, folder, is_trainable=how == "trainable", low_cpu_mem_usage=how == "low_cpu")
        assert stock_classes(base) == classes
        assert [n for n, _ in base.named_parameters()] == names
        assert [n for n, p in base.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
        assert not base._forward_pre_hooks
        assert not hasattr(base, "peft_config")
        with torch.no_grad():
            assert torch.equal(base(input_ids=tokens()).logits, llama()(input_ids=tokens()).logits)
    else:
        model = adapt(base, task_type="CAUSAL_LM", r=3, random_seed=4)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        with torch.no_grad():
            want = model(input_ids=tokens()).logits
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder, "default" if how == "over itself" else "other")
        after = model.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert list(model.peft_config) == ["default"]
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens()).logits, want)


def test_an_adapter_without_weights_is_refused_by_name_and_leaves_the_model_as_it_was(saved):
    folder, _ = saved
    (folder / ADAPTER).unlink()
    base = llama()
    classes = stock_classes(base)
    message = rf"The adapter in {folder} has no weights: neither {ADAPTER} nor adapter_model\.bin"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert stock_classes(base) == classes
    assert not hasattr(base, "peft_config")
    with torch.no_grad():
        assert torch.equal(base(input_ids=tokens()).logits, llama()(input_ids=tokens()).logits)

    model = adapt(base, task_type="CAUSAL_LM", r=3, random_seed=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder.parent, "other", subfolder=folder.name)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    settings = paca.PacaConfig.from_pretrained(folder)
    settings.loading = False  # as the message says
    settings.inference_mode = False
    assert peft.get_peft_model(llama(), settings).get_nb_trainable_parameters()[0] > 0


def test_an_adapter_of_another_model_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(llama(hidden_size=64), folder)
    with pytest.raises(ValueError, match="no such layer"):
        PeftModel.from_pretrained(llama(num_hidden_layers=1), folder)


# -- conversions and generation --------------------------------------------------------------------------------------


def test_the_delta_weight_is_the_difference_of_the_merged_weight():
    model = adapted_perceptron("conv1d", torch.float64)
    layer = model.base_model.model.lin1
    before = layer.base_layer.state_dict()["weight"].clone()
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight - before, layer.get_delta_weight("default"))
    assert layer.supports_lora_conversion()


def test_generation_uses_the_adapter():
    model = adapt(llama(), task_type="CAUSAL_LM", paca_alpha=60)
    prompt = {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 8, "do_sample": False}
    adapted = model.generate(**prompt, **settings)
    with model.disable_adapter():
        plain = model.generate(**prompt, **settings)
    assert torch.equal(plain, llama().generate(**prompt, **settings))
    assert not torch.equal(adapted, plain)
    assert torch.equal(model.merge_and_unload().generate(**prompt, **settings), adapted)


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = adapt(llama(), task_type="CAUSAL_LM", init_weights=True, r=8, paca_alpha=8)
    originals = base_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, value in base_state(model).items():
        assert torch.equal(value, originals[name])


def test_memory_that_two_modules_share_is_refused_as_a_target():
    model = perceptron()
    model.lin3 = nn.Linear(7, 13)
    model.lin3.weight = nn.Parameter(model.lin1.weight.data)
    with pytest.raises(ValueError, match="lin1 shares its weight"):
        adapt(model, target_modules=["lin1"])
    model = perceptron()
    model.register_buffer("kept", model.lin1.weight.data[:5])  # what reads it would read columns
    with pytest.raises(ValueError, match="lin1 shares its weight"):
        adapt(model, target_modules=["lin1"])
    model = perceptron()
    model.again = model.lin1
    with pytest.raises(ValueError, match=r"lin1 is one module under 2 names \(lin1, again\)"):
        adapt(model, target_modules=["lin1"])


def test_a_failed_reload_leaves_an_adapter_that_was_loaded_before(tmp_path):
    adapted_perceptron().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(perceptron(), tmp_path, is_trainable=True)
    x = torch.randn(4, 7)
    want = model(x)
    tensors = load_file(tmp_path / ADAPTER)
    tensors["base_model.model.lin1.paca_delta"][0, 0] = float("nan")
    save_file(tensors, tmp_path / ADAPTER)
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(x), want)


WHOLE = "base_model.model.lin2."
BROKEN_WHOLE = {
    "cut short": (None, "can't be read"),
    "module missing": (lambda t: [t.pop(WHOLE + n) for n in ("weight", "bias")], "no tensor of lin2"),
    "module of another shape": (lambda t: t.update({WHOLE + "weight": torch.zeros(5, 12)}), r"shape \(5, 12\)"),
    "module with nan": (lambda t: t.update({WHOLE + "bias": torch.full((5,), float("nan"))}), "holds NaN or Inf"),
    "another method": (lambda t: t.update({"base_model.model.lin1.lora_A.weight": torch.zeros(2, 7)}), "no such layer"),
    "inf once cast": (
        lambda t: t.update({"base_model.model.lin1.paca_delta": torch.full((13, 3), 1e300, dtype=torch.float64)}),
        "holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", BROKEN_WHOLE)
@pytest.mark.parametrize("beside", [False, True])
def test_a_broken_file_or_saved_module_is_refused_and_leaves_the_model_as_it_was(tmp_path, case, beside):
    breaking, message = BROKEN_WHOLE[case]
    adapt(perceptron(), target_modules=["lin1"], modules_to_save=["lin2"]).save_pretrained(tmp_path)
    path = tmp_path / ADAPTER
    if breaking is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        tensors = load_file(path)
        breaking(tensors)
        save_file(tensors, path)
    base = perceptron()
    x = torch.randn(4, 7)
    if beside:
        model = adapt(base, target_modules=["lin1"])
        want, names = model(x), list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "other")
        assert list(model.state_dict()) == names
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(x), want)
    else:
        classes = stock_classes(base)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert stock_classes(base) == classes
        assert all(p.requires_grad for p in base.parameters())
        assert torch.equal(base(x), perceptron()(x))


@pytest.mark.parametrize("content", [b"no pickle", b"", None])
def test_a_broken_pickle_file_is_refused_and_leaves_the_model_as_it_was(tmp_path, content):
    adapted_perceptron().save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    base = perceptron()
    classes = stock_classes(base)
    with pytest.raises(ValueError, match=r"adapter_model\.bin can't be read"):
        PeftModel.from_pretrained(base, tmp_path)
    assert stock_classes(base) == classes
    assert not hasattr(base, "peft_config")


def test_an_adapter_in_a_pickle_file_and_one_with_embeddings_load(tmp_path):
    model = adapted_perceptron()
    x = torch.randn(4, 7)
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert torch.equal(PeftModel.from_pretrained(perceptron(), tmp_path / "pickle")(x), model(x))
    language = adapt(llama(), task_type="CAUSAL_LM", r=3)
    with torch.no_grad():
        language.get_input_embeddings().weight.mul_(2)
    language.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    again = PeftModel.from_pretrained(llama(), tmp_path / "embeddings")
    assert torch.equal(again.get_input_embeddings().weight, language.get_input_embeddings().weight)


@pytest.mark.parametrize("name", ["", "first.second", "__base__", "keys", "training"])
def test_a_name_that_no_adapter_can_have_is_refused_and_leaves_the_model_as_it_was(name):
    model = adapt(llama(), r=2)
    with pytest.raises(ValueError, match="An adapter can't be called"):
        model.add_adapter(name, paca.PacaConfig(r=2))
    model.add_adapter("another", paca.PacaConfig(r=2))
    assert list(model.peft_config) == ["default", "another"]


def test_columns_that_are_named_for_a_layer_that_is_not_there_are_refused():
    model = llama()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="indices names columns for 'q_porj', but the adapter has no such layer"):
        adapt(model, target_modules=["q_proj"], indices={"q_porj": [0]})
    assert [type(m) for m in model.modules()] == kinds


def test_weights_that_are_taken_away_between_uses_are_refused():
    """As DeepSpeed's ZeRO-3 does."""
    model = adapted_perceptron()
    paca_layers(model)[0].base_layer.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"has the shape \(0,\): something takes weights away"):
        model(torch.randn(2, 7))


@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
def test_a_state_dict_of_parameters_alone_is_saved_with_the_columns_places(tmp_path, adapters):
    model = adapted_perceptron()
    if "other" in adapters:
        model.add_adapter("other", paca.PacaConfig(r=3, random_seed=1, init_weights=False, target_modules=["lin2"]))
    model.save_pretrained(tmp_path, state_dict={n: p for n, p in model.named_parameters() if "paca_delta" in n})
    x = torch.randn(4, 7)
    for name in adapters:
        again = PeftModel.from_pretrained(perceptron(), tmp_path if name == "default" else tmp_path / name)
        model.set_adapter(name)
        torch.testing.assert_close(again(x), model(x))

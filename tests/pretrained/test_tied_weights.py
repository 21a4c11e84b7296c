"""Weights that modules share are never trained silently: refused, or untied when asked."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, LlamaForCausalLM

import paca
from models import adapt, base_state, gpt2, llama, tokens
from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.pretrained.generation import load_for_generation
from tiny_checkpoint import save_base


def tied_llama():
    return llama(tie_word_embeddings=True)


def tied_gpt2():
    return gpt2()  # ties by default


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
        )
    ).eval()  # it drops out


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tied_llama, ["lm_head"]),
        (tied_llama, ["embed_tokens"]),
        (tied_llama, ["q_proj", "embed_tokens", "lm_head"]),
        (tied_llama, r".*(q_proj|lm_head)"),
        (tied_gpt2, ["wte"]),
        (tied_gpt2, ["lm_head"]),
        (bart, ["lm_head"]),
    ],
)
def test_tied_weights_are_refused_and_left_alone(make, targets):
    model = make()
    kinds, ids = [type(m) for m in model.modules()], tokens()
    y = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, which only warns
        with pytest.raises(ValueError, match=r"shares its weight with another module.*paca\.untie_embeddings"):
            adapt(model, target_modules=targets)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(ids).logits, y)


@pytest.mark.parametrize(("make", "embedding"), [(tied_llama, "embed_tokens"), (tied_gpt2, "wte")])
def test_untied_embeddings_are_trained_apart(make, embedding):
    model = make()
    ids = tokens()
    y = model(ids).logits
    assert paca.untie_embeddings(model)
    assert not paca.untie_embeddings(model)
    assert torch.equal(model(ids).logits, y)
    adapted = adapt(model, target_modules=[embedding, "lm_head"], init_weights=True)
    originals = base_state(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inner = adapted.get_base_model()
    first, last = inner.get_input_embeddings(), inner.lm_head
    assert bool(first.paca_delta["default"].any())
    assert bool(last.paca_delta["default"].any())
    assert not torch.equal(first.get_delta_weight("default"), last.get_delta_weight("default"))
    for name, value in base_state(adapted).items():
        assert torch.equal(value, originals[name])


def test_an_untied_model_is_saved_loaded_and_merged_untied(tmp_path):
    model = tied_llama()
    paca.untie_embeddings(model)
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    ids = tokens()
    y = model(ids).logits
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits, y)
    merged = adapt(model, target_modules=["lm_head"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_an_adapter_of_an_untied_layer_needs_its_base_untied(tmp_path):
    model = tied_llama()
    paca.untie_embeddings(model)
    adapted, ids = adapt(model, target_modules=["lm_head", "q_proj"]), tokens()
    y = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="untie_embeddings"):
            peft.PeftModel.from_pretrained(tied_llama(), tmp_path)
    base = tied_llama()
    paca.untie_embeddings(base)
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits, y)


def test_what_can_not_be_untied_is_refused():
    with pytest.raises(TypeError, match="needs a transformers model; got Linear"):
        paca.untie_embeddings(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="adapted already"):
        paca.untie_embeddings(adapt(llama()).get_base_model())
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        paca.untie_embeddings(llama().model)


@pytest.mark.parametrize("whole", ["auto", False])
def test_untied_output_layers_and_embeddings_are_saved_and_loaded(tmp_path, whole):
    """By default PEFT saves the (pretrained) embeddings beside an adapter that targets them."""
    model, ids = adapt(llama(), target_modules=["embed_tokens", "lm_head", "q_proj"]), tokens()
    pretrained = llama().state_dict()
    y = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=whole)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.paca_delta"].shape == (64, 3)
    assert saved["base_model.model.lm_head.paca_delta"].shape == (64, 3)
    for name in ("model.embed_tokens", "lm_head"):
        stored = saved.get(f"base_model.model.{name}.base_layer.weight")
        assert (stored is not None) == (whole == "auto")
        assert stored is None or torch.equal(stored, pretrained[f"{name}.weight"])
    assert torch.equal(peft.PeftModel.from_pretrained(llama(), tmp_path)(ids).logits, y)


def test_a_head_in_modules_to_save_is_a_copy_that_leaves_the_embedding_alone():
    model = tied_llama()
    before = model.model.embed_tokens.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = adapt(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ids = tokens()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    inner = adapted.get_base_model()
    assert not torch.equal(inner.lm_head.modules_to_save["default"].weight, before)
    assert torch.equal(inner.model.embed_tokens.weight, before)


def test_the_default_targets_leave_embeddings_and_output_layer_alone():
    for make in (llama, tied_llama, gpt2):
        adapted = adapt(make())
        names = [n for n, m in adapted.named_modules() if type(m).__name__.startswith("Paca") and "." in n]
        assert names
        assert not any(n.endswith(("lm_head", "embed_tokens", "wte", "wpe")) for n in names)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_commands_untie_the_base_of_an_adapter_that_was_trained_so(targets, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    model = LlamaForCausalLM.from_pretrained(base)
    assert paca.untie_embeddings(model)
    adapted = adapt(model, r=4, target_modules=targets, task_type="CAUSAL_LM").eval()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = adapted(tokens()).logits
        assert torch.equal(load_for_generation(tmp_path / "adapter").model(tokens()).logits, want)
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens()).logits, want)
    if "embed_tokens" not in targets:
        assert len(export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora").adapter.layers) == 1


def test_a_tied_base_stays_tied_for_other_adapters(tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    adapt(LlamaForCausalLM.from_pretrained(base), target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "adapter"
    )
    loaded = load_for_generation(tmp_path / "adapter").model.get_base_model()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

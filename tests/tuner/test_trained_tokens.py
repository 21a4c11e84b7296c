"""Single tokens trained beside the columns (`trainable_token_indices`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from paca import PacaConfig
from paca.convert.adapter import adapter_in_model
from paca.convert.lora import save_as_lora
from paca.convert.pefts_paca import to_pefts_paca, why_not
from paca.layers import PacaLayer
from paca.messages.errors import PacaError

IDS = torch.arange(16)[None]
TOKENS = [3, 5]


def _base(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def _trained(base: Any, **settings: Any) -> tuple[Any, Tensor]:
    config = PacaConfig(**{"r": 16, "trainable_token_indices": TOKENS, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, model(IDS).logits.detach()


@pytest.mark.parametrize("tied", [False, True])
def test_their_rows_train_and_no_others(tied: bool, tmp_path: Path) -> None:
    base = _base(tied=tied)
    before, untouched = base(IDS).logits.detach(), base.get_input_embeddings().weight.detach().clone()
    model, after = _trained(base)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(IDS).logits, after, atol=1e-6)
    moved = (merged.get_input_embeddings().weight != untouched).any(1).nonzero().flatten()
    assert moved.tolist() == TOKENS
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    [rows] = [tensor for name, tensor in stored.items() if "embed_tokens" in name]
    assert rows.shape == (2, 32)
    again = peft.PeftModel.from_pretrained(_base(tied=tied), tmp_path)
    assert torch.equal(again(IDS).logits, after)
    assert torch.equal(model.unload()(IDS).logits, before)


def test_in_16_bits_their_rows_train_in_float32_unless_asked() -> None:
    def dtype(**settings: Any) -> torch.dtype:
        config = PacaConfig(r=16, trainable_token_indices=TOKENS)
        model = peft.get_peft_model(_base(dtype=torch.bfloat16), config, **settings)
        [rows] = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        assert rows.requires_grad
        return rows.dtype

    assert dtype() == torch.float32
    assert dtype(autocast_adapter_dtype=False) == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [32]}, r"holds token 32: model.embed_tokens has the tokens 0 to 31\. New tokens"),
        ({"trainable_token_indices": [-1]}, "holds token -1"),
        ({"trainable_token_indices": [3, 3]}, "names a token twice"),
        ({"trainable_token_indices": {"embed_tokens": []}}, "names no token"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "cannot be applied to modules of type"),
    ],
)
def test_what_they_can_not_be_is_told_and_leaves_the_model(settings: dict[str, Any], message: str) -> None:
    base = _base()
    before, kinds = base(IDS).logits, [type(module) for module in base.modules()]
    with pytest.raises((ValueError, TypeError), match=message):  # the last one is PEFT's
        peft.get_peft_model(base, PacaConfig(**{"r": 16, "trainable_token_indices": TOKENS} | settings))
    assert [type(module) for module in base.modules()] == kinds
    assert torch.equal(base(IDS).logits, before)


def test_a_model_without_such_an_embedding_is_told_so_by_peft() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 16))
    with pytest.raises(ValueError, match="embed_tokens"):
        peft.get_peft_model(model, PacaConfig(r=16, target_modules=["1"], trainable_token_indices=[3]))
    assert type(model[1]) is torch.nn.Linear
    named = PacaConfig(r=16, target_modules=["1"], trainable_token_indices={"0": [3]})
    assert sum(p.numel() for p in peft.get_peft_model(model, named).parameters() if p.requires_grad) == 16 * 16 + 16


@pytest.mark.parametrize("value", ["3", [1.5], {"embed_tokens": ["a"]}, 7])
def test_other_forms_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="trainable_token_indices must be a list of tokens"):
        PacaConfig(trainable_token_indices=value)


def test_a_file_without_their_rows_is_refused_and_leaves_the_model(tmp_path: Path) -> None:
    model, _ = _trained(_base(), trainable_token_indices=None)
    model.peft_config["default"].trainable_token_indices = TOKENS
    model.save_pretrained(tmp_path)
    base = _base()
    before = base(IDS).logits
    with pytest.raises(ValueError, match="which its trainable_token_indices promise"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(base(IDS).logits, before)
    assert not any(isinstance(module, PacaLayer) for module in base.modules())


def test_two_adapters_switch_and_run_in_one_batch() -> None:
    model, first = _trained(_base())
    model.add_adapter("second", PacaConfig(r=16, trainable_token_indices=[7], random_seed=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".second"):
                parameter.add_(0.1)
    model.set_adapter("second")
    second = model(IDS).logits.detach()
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    model.eval()
    mixed = model(IDS.repeat(3, 1), adapter_names=["second", "default", "__base__"]).logits
    assert torch.allclose(mixed[0], second[0], atol=1e-5)
    assert torch.allclose(mixed[1], first[0], atol=1e-5)
    with pytest.raises(ValueError, match="no weighted sum"):
        model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_a_layer_of_which_columns_are_trained_is_refused() -> None:
    model = peft.get_peft_model(_base(), PacaConfig(r=16, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match=r"rows of model\.embed_tokens, of which columns are trained"):
        model.add_adapter("second", PacaConfig(r=16, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    assert list(model.peft_config) == ["default"]


def test_they_go_into_lora_and_not_into_pefts_paca(tmp_path: Path) -> None:
    model, after = _trained(_base())
    save_as_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(_base(), tmp_path)
    assert torch.allclose(lora(IDS).logits, after, atol=1e-5)
    with pytest.raises(PacaError, match="trains single tokens"):
        to_pefts_paca(adapter_in_model(model))
    reason = why_not({"r": 16, "paca_alpha": 16, "trainable_token_indices": TOKENS}, [])
    assert reason == "it trains single tokens (trainable_token_indices), which that does not know"

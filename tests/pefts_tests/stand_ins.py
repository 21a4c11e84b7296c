"""Tiny models with random weights, under the names that PEFT's tests take from the hub: a hub cannot be reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

_WORDS = 1000
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER: dict[str, Any] = {"intermediate_size": 64, "max_position_embeddings": 512}
_DECODER: dict[str, Any] = {"num_key_value_heads": 2, **_ENCODER, **_TOKENS}
_SHARED: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_OTHER_NAMES = ("GPT2", "GPTJ", "T5", "Bart")
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_START = {"decoder_start_token_id": 0}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
_EXPERTS: dict[str, Any] = {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}

STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT CausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2 LMHeadModel", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2 LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ CausalLM", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama CausalLM", _DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama CausalLM", _DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2 CausalLM", _DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3 CausalLM", {**_DECODER, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral CausalLM", _DECODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5 ConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Bart ConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("Bert Model", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta Model", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta Model", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2 Model", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert SequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("Roberta SequenceClassification", _ENCODER),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("Llama SequenceClassification", _DECODER),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOss CausalLM", _EXPERTS),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4 CausalLM", {**_EXPERTS, "intermediate_size_mlp": 64}),
}
"""Name: kind of model, sizes of its config."""


def save_stand_ins(folder: Path) -> None:
    """Save each in a folder of its name below `folder`, with a tokenizer of words."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, _WORDS)}}
    splitting = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splitting.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=splitting, **names)
    for name, (kind, sizes) in STAND_INS.items():
        torch.manual_seed(0)
        family, _, task = kind.partition(" ")
        shared = {} if family in _OTHER_NAMES else _SHARED
        text = "Text" if family in ("Gemma3", "Llama4") else ""
        config = getattr(transformers, f"{family}{text}Config")(vocab_size=_WORDS, **shared, **sizes)
        ending = task if task in ("Model", "LMHeadModel") else f"For{task}"
        getattr(transformers, f"{family}{ending}")(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

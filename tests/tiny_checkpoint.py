"""A two-layer Llama with a byte-level tokenizer and a chat template, and runs that were "trained" on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import paca

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 256


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """The same without a chat template, which puts its end-of-text token after every text."""
    tokenizer = byte_tokenizer(chat_template=None)
    end = (str(tokenizer.eos_token), int(tokenizer.eos_token_id))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    return tokenizer


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 112}
"""Settings of `save_base` for layers that have room for the default r."""


def save_base(folder: Path, dtype: torch.dtype = torch.float32, context: int = CONTEXT, **settings: Any) -> Path:
    """A checkpoint with random weights, large enough that an adapter visibly moves the logits."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape | settings,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 1) -> Path:
    """An adapter with random deltas, as `save_pretrained` leaves it."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    config = paca.PacaConfig(r=5, paca_alpha=5, task_type="CAUSAL_LM", selection="random")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "paca_delta" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


def save_run(folder: Path, dtype: torch.dtype = torch.float32, context: int = CONTEXT) -> Path:
    """A run folder as `paca train` leaves one for a GGUF model: `base/` and `adapter/` with the tokenizer."""
    base = save_base(folder / "base", dtype, context)
    save_adapter(folder / "adapter", base)
    byte_tokenizer().save_pretrained(folder / "adapter")
    return folder

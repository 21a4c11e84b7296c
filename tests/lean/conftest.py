"""Tiny models of every known architecture, with odd sizes and weights large enough for every branch to matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

_SHARED = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SHARED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SHARED, "head_dim": 12}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SHARED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SHARED, "head_dim": 10}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _SHARED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_SHARED, "head_dim": 10, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_SHARED, "head_dim": 10, "sliding_window": 3}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _SHARED),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": 31,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "dropout": 0.0,
            "init_std": 0.3,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 31,
            "n_embd": 24,
            "n_inner": 37,
            "n_layer": 2,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.3,
        },
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def _tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    config_name, model_name, options = _CONFIGS[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{"attn_implementation": "sdpa", **options, **overrides})
    model = getattr(transformers, model_name)(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            nn.init.normal_(parameter, mean=0.7, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """Makes a model: `(architecture, dtype, **config overrides)`, always with the same weights, in training mode."""
    return _tiny_model


def _run(model: nn.Module, batch: int = 3, length: int = 7) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward of one padded batch: the logits, and the gradients of the parameters and of the embeddings."""
    generator = torch.Generator().manual_seed(1)
    width = model.get_input_embeddings().weight.shape[1]
    dtype = model.get_input_embeddings().weight.dtype
    embeddings = torch.randn(batch, length, width, generator=generator).to(dtype).requires_grad_()
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    model.zero_grad()
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {"embeddings": embeddings.grad, **gradients}


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Runs a step: `(model, batch, length)` -> logits and gradients by name."""
    return _run

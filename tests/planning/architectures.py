"""Small configurations of architectures that keep different things for the backward pass."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

_GATED: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 32}),  # norms of queries and keys
    "gemma2": ("Gemma2Config", {**_GATED, "head_dim": 32, "sliding_window": 40}),  # plain attention, two kinds of block
    "gemma3": ("Gemma3TextConfig", {**_GATED, "head_dim": 32, "sliding_window": 40}),  # masks in some blocks only
    "phi3": ("Phi3Config", _GATED),  # fused projections
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_GATED, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    ),  # a mixture of experts, in a grouped product
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 500,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),  # layer norms, biases, dropout
    "gpt2": ("GPT2Config", {"vocab_size": 500, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),  # Conv1D
    "bloom": ("BloomConfig", {"vocab_size": 500, "hidden_size": 64, "n_layer": 2, "n_head": 4}),  # no lean blocks
}
ARCHITECTURES = tuple(name for name in _CONFIGS if name != "bloom")


def config(architecture: str, **settings: Any) -> PreTrainedConfig:
    name, options = _CONFIGS[architecture]
    return getattr(transformers, name)(**{**options, **settings})

"""Tiny configurations of every known architecture: odd sizes, and weights large enough for every branch to matter."""

from __future__ import annotations

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
CONFIGS: dict[str, tuple[str, str, dict]] = {
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
ARCHITECTURES = tuple(CONFIGS)
GATED = tuple(name for name in ARCHITECTURES if name not in ("opt", "gpt2"))

"""Tiny random mixture-of-experts models of real architectures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

STACKS = ["experts.gate_up_proj", "experts.down_proj"]

_SHARED = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def _built(kind: type[Any], config: Any, implementation: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind._from_config(config, experts_implementation=implementation)
    for name, parameter in model.named_parameters():  # biases, sinks and norms that start flat would hide mistakes
        if "bias" in name or "sinks" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.15)
    return model


def mixtral(implementation: str = "grouped_mm", seed: int = 0, **settings: Any) -> MixtralForCausalLM:
    config = MixtralConfig(**{**_SHARED, "num_local_experts": 4, "intermediate_size": 48, **settings})
    return _built(MixtralForCausalLM, config, implementation, seed)


def qwen3_moe(implementation: str = "grouped_mm", seed: int = 0, **settings: Any) -> Qwen3MoeForCausalLM:
    sizes = {"num_experts": 8, "moe_intermediate_size": 40, "intermediate_size": 48, "norm_topk_prob": True}
    return _built(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_SHARED, **sizes, **settings}), implementation, seed)


def gpt_oss(implementation: str = "grouped_mm", seed: int = 0, **settings: Any) -> GptOssForCausalLM:
    sizes = {"num_local_experts": 4, "intermediate_size": 48, "sliding_window": 8}
    return _built(GptOssForCausalLM, GptOssConfig(**{**_SHARED, **sizes, **settings}), implementation, seed)


FAMILIES = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}
IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]

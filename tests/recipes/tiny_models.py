"""Tiny random checkpoints in place of the models that recipes name: their architectures, their kinds of tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, ViTImageProcessor

from tiny_checkpoint import byte_tokenizer

_SIZES: dict[str, Any] = {
    "hidden_size": 96,  # the largest r of a recipe is 80
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Published:
    """What of a model on the hub its stand-in must share."""

    model_type: str
    chat: bool = True
    """Whether its tokenizer has a chat template."""
    pads: bool = True
    """Whether its tokenizer has a padding token of its own."""
    more: dict[str, Any] = field(default_factory=dict)
    """Of its config."""


_LLAMA = Published("llama", pads=False)
_BASE = Published("llama", chat=False, pads=False)
_QWEN = Published("qwen3")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
MODELS = {
    "meta-llama/Llama-2-7b-hf": _BASE,
    "meta-llama/Llama-2-13b-hf": _BASE,
    "meta-llama/Meta-Llama-3-8B": _BASE,
    "meta-llama/Llama-3.1-70B": _BASE,
    "meta-llama/Llama-3.2-1B": _BASE,
    "meta-llama/Llama-3.2-3B": _BASE,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA,
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA,
    "mistralai/Mistral-7B-Instruct-v0.3": Published("mistral", pads=False),
    "google/gemma-3-1b-it": Published("gemma3_text", more={"sliding_window": 64}),
    "Qwen/Qwen3-0.6B": _QWEN,
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN,
    "Qwen/Qwen3-8B": _QWEN,
    "Qwen/Qwen3-14B": _QWEN,
    "Qwen/Qwen3-32B": _QWEN,
    "Qwen/Qwen3-30B-A3B": Published("qwen3_moe", more=_EXPERTS),
    "google/vit-base-patch16-224-in21k": Published("vit"),
    "timm/tf_efficientnetv2_l.in21k": Published("timm_wrapper"),
}
"""By hub id."""


def save_stand_in(name: str, folder: Path) -> Path:
    """Write a checkpoint in place of the model of that hub id.

    Returns:
        Its folder.
    """
    torch.manual_seed(0)
    kind = MODELS[name]
    if kind.model_type == "timm_wrapper":
        _save_timm(name, folder)
    elif kind.model_type == "vit":
        config = AutoConfig.for_model(
            "vit", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32
        )
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        tokenizer = byte_tokenizer()
        if not kind.chat:
            tokenizer.chat_template = None
        if not kind.pads:
            tokenizer.pad_token = None
        special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(kind.model_type, **_SIZES, vocab_size=len(tokenizer), **special, **kind.more)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _save_timm(name: str, folder: Path) -> None:
    """In timm's own layout, as it lies on the hub: there is no file for the image processor."""
    sizes = {"channel_multiplier": 0.25, "depth_multiplier": 0.1}
    model = timm.create_model(
        name.removeprefix("timm/"), num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **sizes
    )
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_args": sizes}))

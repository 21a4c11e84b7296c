"""Tiny random models of each family of causal language models that transformers has, from their configs alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_checkpoint import byte_tokenizer

FAMILIES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
LARGEST = 30_000_000
"""Parameters; a family that stays larger is left out."""

_SIZES: dict[int, tuple[str, ...]] = {
    64: (
        *("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "word_embed_proj_dim", "embedding_size", "lru_width"),
        "attention_hidden_size",
    ),
    96: (
        *("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"),
        "intermediate_size_mlp",
    ),
    32: (
        *("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"),
        *("moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    ),
    256: ("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"),
    16: (
        *("head_dim", "kv_channels", "d_kv", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
        *("v_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"),
        *("mamba_d_head", "chunk_size", "sliding_window"),
    ),
    8: (*("mamba_d_state", "state_size", "ssm_state_size", "hidden_size_per_layer_input", "index_topk", "rotary_dim"),),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        *("linear_num_value_heads", "mamba_num_heads", "mamba_n_heads", "time_step_rank"),
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
        *("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_top_k", "index_n_heads"),
        *("linear_num_key_heads", "num_memory_blocks"),
    ),
    1: (
        *("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "mamba_n_groups", "n_groups"),
        *("mamba_expand", "decoder_sparse_step", "interleave_moe_layer_step"),
    ),
    0: ("dropout", "first_k_dense_replace", "num_nextn_predict_layers", "num_dense_layers"),
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "nemotron_h": {"layer_types": ["mamba", "full_attention", "moe", "mlp"]},
}


def write_first_run(family: str, folder: Path) -> Path:
    """The YAML of a run with the defaults, on a tiny model of `family` and data beside it.

    Raises:
        ValueError: It can't be made tiny.
    """
    tokenizer = byte_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shrunk(family, len(tokenizer), **special).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What follows {n}?", "completion": f" It is {n + 1}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "eval": 8},
        "paca": {"r": 4},
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_length": 96},
        "output": {"dir": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


def shrunk(family: str, vocab_size: int, **tokens: int) -> Any:
    """A model of `family` with `vocab_size` tokens, whose loss and gradients are finite numbers.

    Raises:
        ValueError: None of the sizes that were tried fits.
    """
    troubles = []
    for options in _tries(family, {"vocab_size": vocab_size, **tokens}):
        try:
            torch.manual_seed(0)
            with torch.device("meta"):
                outline = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
            if (size := sum(p.numel() for p in outline.parameters())) > LARGEST:
                raise ValueError(f"{size:,} parameters")
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
            ids = torch.randint(5, vocab_size - 1, (2, 24))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if not loss.isfinite():
                raise ValueError("the loss is no number")
        except Exception as error:  # whatever sizes that don't fit each other raise
            troubles.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:90])
            continue
        model.zero_grad()
        return model
    raise ValueError("; ".join(dict.fromkeys(troubles)))


def _tries(family: str, given: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Options of the family's config: small ones, and what some families need instead."""
    base = AutoConfig.for_model(family)
    plain = {**_small(base, given), **_OWN.get(family, {})}
    for name, part in vars(base).items():
        if isinstance(part, PreTrainedConfig):
            images = {"image_size": 32, "patch_size": 16} if "vision" in name else {}
            plain[name] = {"model_type": part.model_type, **_small(part, given), **images}
    yield plain
    yield {**plain, **{name: 8 for name in _LAYERS if name in plain}}  # a hybrid has attention in each fourth layer
    latent = {name: value for name, value in plain.items() if name not in ("head_dim", "num_key_value_heads")}
    yield {**latent, **({"qk_rope_head_dim": 8} if "qk_rope_head_dim" in latent else {})}
    yield {name: value for name, value in plain.items() if name != "num_key_value_heads"}
    yield {**plain, "pad_token_id": 1}  # where it is a row of the embeddings, below its other tokens


def _small(config: PreTrainedConfig, given: dict[str, int]) -> dict[str, Any]:
    known = {**config.to_dict(), **getattr(type(config), "attribute_map", {})}
    options: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names if name in known}
    options |= {name: number for name, number in given.items() if name in known}
    name = getattr(type(config), "attribute_map", {}).get("layer_types", "layer_types")
    if known.get(name) is not None and not isinstance(getattr(type(config), name, None), property):
        options["layer_types"] = None  # of as many layers as there were
    return options

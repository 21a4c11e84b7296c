"""The ``train`` section of a run: fields of ``trl.SFTConfig``, our defaults for them, and those we set ourselves."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from paca.messages.errors import PacaError
from paca.training.free_sections import check_train_keys, train_annotation
from paca.training.key_checks import Origins, check_choice, check_type
from paca.training.value_ranges import check_ranges


@cache
def train_fields() -> dict[str, Any]:
    """Name and type of each field of ``SFTConfig``."""
    annotations = typing.get_type_hints(SFTConfig)
    return {
        option.name: train_annotation(option.name, annotations[option.name])
        for option in dataclasses.fields(SFTConfig)
        if option.init
    }


def check_train_settings(settings: Mapping[str, Any], origins: Origins) -> None:
    """Check the keys, types, choices and ranges of the section.

    Raises:
        PacaError: An unknown key, a key that has another place, a wrong type, or a value outside the choices
            or the range that can work.
    """
    fields = train_fields()
    check_train_keys(settings, fields, origins)
    choices = {option.name: option.metadata.get("choices") for option in dataclasses.fields(SFTConfig)}
    for name, value in settings.items():
        key = f"train.{name}"
        check_type(key, value, fields[name], origins)
        check_choice(key, value, choices[name], origins)
    check_ranges("train", settings, origins)


def with_defaults(
    settings: Mapping[str, Any], *, has_eval: bool, weights_dtype: torch.dtype, context_length: int | None
) -> dict[str, Any]:
    """The section with our own defaults where the user gave nothing.

    Args:
        settings: What the user gave.
        has_eval: Whether there is held-out data.
        weights_dtype: Type of the model's weights in memory.
        context_length: Longest sequence the model takes, in tokens, where it says so.
    """
    # Numbers that change the result are spelled out even where they are TRL's own defaults today.
    defaults: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 4,
        "max_length": min(1024, context_length or 1024),
        "packing": False,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "bf16": _wants_autocast(settings, weights_dtype),
        _checkpointing_field(): False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # true would replace a NaN loss by the mean of the losses before it
        "eval_strategy": "steps" if has_eval else "no",
        "save_strategy": "steps",
        "save_steps": 0.2,  # a share of all steps, as eval_steps
        "save_total_limit": 2,
        "report_to": "none",
    }
    if settings.get("eval_strategy", defaults["eval_strategy"]) == "steps":
        defaults["eval_steps"] = 0.2
    if settings.get("load_best_model_at_end"):  # which needs a checkpoint at each evaluation
        defaults["save_strategy"] = settings.get("eval_strategy", defaults["eval_strategy"])
        defaults["save_steps"] = settings.get("eval_steps", 0.2)
    packs = settings.get("packing", False) or settings.get("padding_free", False)
    # Without padding there is no attention mask to count by, and every position is a token.
    defaults["include_num_input_tokens_seen"] = "all" if packs else "non_padding"
    if settings.get("gradient_checkpointing") is not None:  # the older name of the same field
        del defaults[_checkpointing_field()]
    return {**defaults, **settings}


def sft_config(settings: Mapping[str, Any], checkpoints: Path) -> SFTConfig:
    """The ``SFTConfig`` of a run.

    Args:
        settings: The section with its defaults.
        checkpoints: The folder for checkpoints.

    Raises:
        PacaError: TRL or transformers refuses the combination of settings.
    """
    if not torch.accelerator.is_available():
        # Several processes on CPUs, and bf16 there, work only when the CPU is asked for.
        settings = {**settings, "use_cpu": True}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
            return SFTConfig(output_dir=str(checkpoints), disable_tqdm=True, **settings)
    except (ValueError, TypeError) as error:
        raise PacaError(f"The section train does not work out: {error}") from error


def _checkpointing_field() -> str:
    return "activation_checkpointing" if "activation_checkpointing" in train_fields() else "gradient_checkpointing"


def _wants_autocast(settings: Mapping[str, Any], weights_dtype: torch.dtype) -> bool:
    # 16-bit weights multiply in their own type already, and on a CPU autocast costs more than it saves.
    if weights_dtype != torch.float32 or settings.get("fp16") or settings.get("use_cpu"):
        return False
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()

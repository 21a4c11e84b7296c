"""Quantizing a checkpoint with bitsandbytes as it is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from paca.messages.errors import PacaError

QUANTIZATIONS = ("nf4", "fp4", "int8")


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings of `"nf4"`, `"fp4"` (both with double quantization) or `"int8"`.

    Args:
        quantization: One of the three.
        compute_dtype: Of the matmuls.

    Raises:
        PacaError: An unknown name, or bitsandbytes is missing.
    """
    if quantization not in QUANTIZATIONS:
        raise PacaError(f"Unknown quantization {quantization!r}. Give one of: {', '.join(QUANTIZATIONS)}.")
    require_bitsandbytes(quantization)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_not_quantized(config: PreTrainedConfig, name: str, quantization: str) -> None:
    """
    Args:
        config: Of the checkpoint.
        name: Of it, for the message; a space, then the name in quotes, or nothing.
        quantization: What it is to be quantized to.

    Raises:
        PacaError: It is quantized already.
    """
    method = method_of(config)
    if method is not None:
        raise PacaError(
            f"The checkpoint{name} is quantized already ({method}), so it can't be quantized to {quantization}. "
            "Leave the quantization out, or give the original checkpoint."
        )


def method_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint is quantized, by transformers' name for it; None if it is not."""
    found: Any = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
    return None if method is None else str(getattr(method, "value", method))


def require_bitsandbytes(what: str) -> None:
    """
    Args:
        what: Is to be quantized, or how.

    Raises:
        PacaError: Bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PacaError(f"{what}: quantized weights need bitsandbytes: pip install 'paca-tuning[bitsandbytes]'.")


def device_map() -> dict[str, torch.device | str]:
    """Everything on this process's device: quantized weights can't be moved freely later."""
    if not torch.accelerator.is_available():
        return {"": "cpu"}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return {"": torch.device(kind.type, torch.accelerator.current_device_index())}


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model was quantized, now or by the checkpoint."""
    return bool(getattr(model, "is_quantized", False))


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the form that a backward pass can read.

    For inference on CPUs with AVX512-BF16, bitsandbytes repacks them into another one: the first evaluation of a run
    would be the end of its training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False

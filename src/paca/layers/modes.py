"""Which of the three ways a layer is run in: resident, patched or additive (design, section 3)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from paca.layers.offloading_hooks import has_offloaded_params
from paca.layers.overlaid_weight import AdditiveWeight, OverlaidWeight, PatchedWeight, features
from paca.quantized import quantization_of
from paca.quantized.torchao import is_torchao
from paca.quantized.weight import comes_from

OVERLAID: dict[str, type[OverlaidWeight]] = {"patched": PatchedWeight, "additive": AdditiveWeight}

FORWARD_ONLY = {
    "gptqmodel": "GPTQ, AWQ",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "eetq": "EETQ",
    "transformers.integrations.eetq": "EETQ",
    "aqlm": "AQLM",
}
"""Packages whose quantized layers multiply but don't dequantize, and what they are for."""


def mode_of(target: nn.Module, key: str, model: Any) -> str:
    """`"resident"`, `"patched"` or `"additive"`, for a module that `model` calls `key`. Raise `ValueError` if it is
    quantized in a way that can't be trained, with the reason."""
    quantization = quantization_of(target)
    if quantization is not None:
        if problem := quantization.problem(target):
            raise ValueError(f"{key} is a {type(target).__qualname__} of {quantization.library}, but {problem}.")
        if has_offloaded_params(target) and not is_torchao(getattr(target, "weight", None)):
            raise ValueError(
                f"{key} is a {type(target).__qualname__} of {quantization.library} that accelerate offloads, and its "
                "weight is not there in the backward pass. Load the model with a device_map that keeps its quantized "
                "layers on one device (what transformers offloads by itself stays in plain floats, which can be "
                "adapted), or leave this layer out of target_modules."
            )
        return "additive" if is_offloaded(target, model) else "patched"
    if any(comes_from(c, package) for c in type(target).__mro__ for package in FORWARD_ONLY):
        try:
            features(target)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return "additive"
    if isinstance(target, nn.Linear) and is_torchao(target.weight):
        return "additive"
    if type(target) in (nn.Linear, Conv1D) and (is_offloaded(target, model) or is_partitioned(target)):
        return "additive"
    return "resident"


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 takes the module's weight apart, or is going to: it is whole only while it runs."""
    return hasattr(module._parameters.get("weight"), "ds_id") or is_deepspeed_zero3_enabled()


def is_offloaded(module: nn.Module, model: Any) -> bool:
    """Whether accelerate keeps the module's weight elsewhere until it runs, or is going to."""
    if has_offloaded_params(module):
        return True
    # PEFT takes the hooks off before it loads an adapter, and dispatches the model anew, by another map, after it.
    return offloads(model) and len(set(model.hf_device_map.values())) > 1 and not hasattr(module, "_hf_hook")


def offloads(model: Any) -> bool:
    """Whether a model was loaded with a device map that keeps some of it on the CPU or the disk."""
    return bool({"cpu", "disk"} & set((getattr(model, "hf_device_map", None) or {}).values()))


def known_quantizations() -> str:
    """For messages: what can be adapted besides plain weights."""
    return f"quantized layers of bitsandbytes, torchao, hqq, {', '.join(FORWARD_ONLY)}"

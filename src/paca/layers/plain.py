"""A quantized model made plain: every quantized layer dequantized, with adapters' columns where there are any."""

from __future__ import annotations

from typing import Any

import torch

from paca.layers.overlaid import OverlaidLinear
from paca.quantized import quantization_of

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")


@torch.no_grad()
def dequantize_model(model: Any, adapter_names: list[str] | None) -> None:
    """Put ordinary `nn.Linear` layers in place of all quantized ones, in place, in the model's dtype.

    Columns of the adapters (default: the active ones) are written into the new weights, rounded once. The layers have
    passed `check_writable`.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OverlaidLinear)}
    inside = {id(layer.base_layer) for layer in layers.values()}
    for name, module in list(model.named_modules()):
        quantization = quantization_of(module)
        if isinstance(module, OverlaidLinear):
            dtype = _dtype_of(model, module.weight_placement()[1])
            plain = module.dequantized_linear(dtype, adapter_names)
        elif quantization is not None and id(module) not in inside:
            dtype = _dtype_of(model, quantization.stored_dtype(module))
            plain = quantization.plain(module, quantization.dequantize(module).to(dtype))
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    for mark in _MARKS:
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config


def _dtype_of(model: Any, stored: torch.dtype) -> torch.dtype:
    """A transformers model's own dtype; else what the weight dequantizes to."""
    return getattr(model, "dtype", None) or stored

"""torchao: an `nn.Linear` whose weight is a tensor subclass (int8, int4 and other weight-only formats)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.quantized.weight import QuantizedWeight, comes_from


class TorchAo(QuantizedWeight):
    """Weight-only formats of `torchao.quantization.quantize_` that have `dequantize`."""

    library = "torchao"
    stock_dequantizes = False  # for int8 it multiplies with the codes first, and with the scales then

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or not is_torchao(module.weight):
            return False
        # Every tensor has a method `dequantize`; only torchao's own knows its formats.
        return comes_from(next(c for c in type(module.weight).__mro__ if "dequantize" in vars(c)), "torchao")

    def problem(self, module: Any) -> str | None:
        weight = module.weight
        if not hasattr(weight, "qdata"):
            return f"torchao's {type(weight).__name__} is not one of the formats that paca knows"
        if getattr(weight, "act_quant_kwargs", None) is not None or getattr(weight, "activation_quantization", None):
            return "it quantizes its inputs as well, which training does not reproduce; use a weight-only config"
        return None

    def name(self, module: Any) -> str:
        weight = module.weight
        kind = getattr(weight, "target_dtype", weight.qdata.dtype)
        block = "x".join(str(size) for size in getattr(weight, "block_size", ()))
        return f"torchao {type(weight).__name__} {str(kind).removeprefix('torch.')}" + (f" in {block}" if block else "")

    def stored_dtype(self, module: Any) -> torch.dtype:
        return module.weight.dtype

    def dequantize(self, module: Any) -> Tensor:
        return module.weight.dequantize()

    def replace(self, module: Any, weight: Tensor) -> Any:
        old = module.weight
        module.weight = nn.Parameter(_quantized_like(old, weight.to(old.dtype)), requires_grad=False)
        return old

    def restore(self, module: Any, kept: Any) -> None:
        module.weight = kept


def is_torchao(weight: Any) -> bool:
    """Whether a tensor is one of torchao's."""
    return isinstance(weight, Tensor) and comes_from(type(weight), "torchao")


def _quantized_like(old: Any, weight: Tensor) -> Tensor:
    """`weight (out_features, in_features)` in the format of `old`; `ValueError` if its settings can't be read off."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerGroup, PerRow, PerTensor

    block = [int(size) for size in getattr(old, "block_size", ())]
    if isinstance(old, Int8Tensor):
        if block == list(old.shape):
            return Int8Tensor.from_hp(weight, granularity=PerTensor())
        return Int8Tensor.from_hp(weight, granularity=PerRow() if block[1] == old.shape[1] else PerGroup(block[1]))
    if isinstance(old, IntxUnpackedToInt8Tensor):
        return IntxUnpackedToInt8Tensor.from_hp(weight, tuple(block), old.target_dtype)
    raise ValueError(
        f"A merged weight can't be quantized back to torchao's {type(old).__name__}. Use "
        "merge_and_unload(dequantize=True), or keep the adapter unmerged."
    )

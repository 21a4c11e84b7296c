"""Quantized weights: one file per library, and the table by which a layer's is found."""

from __future__ import annotations

from torch import nn

from paca.quantized.bitsandbytes import EightBit, FourBit
from paca.quantized.hqq import HalfQuadratic
from paca.quantized.torchao import TorchAo
from paca.quantized.weight import QuantizedWeight

PATCHABLE: tuple[QuantizedWeight, ...] = (FourBit(), EightBit(), TorchAo(), HalfQuadratic())


def quantization_of(module: nn.Module) -> QuantizedWeight | None:
    """How `module`'s weight is quantized, if it is in a way that dequantizes."""
    return next((kind for kind in PATCHABLE if kind.matches(module)), None)


__all__ = ["PATCHABLE", "QuantizedWeight", "quantization_of"]

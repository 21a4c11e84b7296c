"""Linear layers quantized to 4 bits with bitsandbytes (NF4, double quantization), as QLoRA and QPaCA use them."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from paca.bench.method import MethodUnavailable


def require_bitsandbytes() -> None:
    """
    Raises:
        MethodUnavailable: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MethodUnavailable("needs bitsandbytes for its 4-bit weights: pip install 'paca-tuning[bitsandbytes]'")


def quantized(linear: nn.Linear) -> nn.Module:
    """`linear`, whose weight `(out_features, in_features)` lies on its device, as a 4-bit layer on that device."""
    import bitsandbytes

    weight = linear.weight
    layer: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer.to(weight.device)  # the move quantizes

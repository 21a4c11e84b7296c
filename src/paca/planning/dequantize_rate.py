"""How fast a device unpacks quantized weights, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paca.messages.errors import PacaError
from paca.planning.live_memory import LiveMemory
from paca.planning.matmul_rate import device_name, shortest_time
from paca.pretrained.quantizing import require_bitsandbytes
from paca.quantized import quantization_of

LARGEST = 4096
"""Width of the weight that is unpacked to measure: beyond any cache, and quantized in a second."""


@dataclass(frozen=True)
class DequantizeRate:
    """Bytes that unpacking a quantized weight reads and writes per second."""

    bytes_per_second: float
    source: str
    """Where the number is from, for people."""


def given_bandwidth(bytes_per_second: float) -> DequantizeRate:
    """A device's memory bandwidth, stated instead of measured: unpacking can't be faster.

    Raises:
        PacaError: it is not positive.
    """
    if bytes_per_second <= 0:
        raise PacaError(f"A bandwidth must be above 0 bytes per second, not {bytes_per_second}.")
    return DequantizeRate(bytes_per_second, "as given")


def measure_dequantize_rate(
    device: str, dtype: torch.dtype, features: int, quantization: str, seconds: float = 0.5
) -> DequantizeRate:
    """Time the unpacking of a `(features, features)` weight, as a training step does it.

    Args:
        device: `"cpu"` or `"cuda"`, which has to be there.
        dtype: that it is unpacked to.
        features: the model's hidden size.
        quantization: as `MemoryEstimate.weights` names it: `"nf4"`, `"int8"`, `"nf4 without double quantization"`.
        seconds: how long to measure.

    Raises:
        PacaError: bitsandbytes is not installed.
    """
    require_bitsandbytes(quantization)
    features = min(features, LARGEST)
    layer = _layer(device, dtype, features, quantization)
    kind = quantization_of(layer)
    assert kind is not None
    positions = torch.zeros(1, dtype=torch.int64, device=device)

    def unpack() -> Any:
        assert kind is not None
        return kind.weight_and_columns(layer, dtype, positions)

    with torch.no_grad():
        with LiveMemory() as memory:
            unpack()
        rate = memory.dequantized / shortest_time(unpack, device, seconds)
    return DequantizeRate(rate, f"measured on {device_name(device)} with {quantization}")


def _layer(device: str, dtype: torch.dtype, features: int, quantization: str) -> nn.Module:
    import bitsandbytes

    weight = torch.randn(features, features, dtype=dtype)
    layer: Any
    if quantization == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(features, features, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind, _, once = quantization.partition(" without ")
        options: dict[str, Any] = {"compress_statistics": not once, "quant_type": kind}
        layer = bitsandbytes.nn.Linear4bit(features, features, bias=False, device="meta", **options)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    return layer.to(device)  # the move quantizes

"""How fast a device multiplies matrices and unpacks quantized weights: measured, or as given."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paca.messages.errors import PacaError
from paca.planning.live_memory import LiveMemory
from paca.pretrained.quantizing import quantized_linear, require_bitsandbytes
from paca.quantized import quantization_of

ROWS = (128, 512, 2048, 8192)
LARGEST_UNPACKED = 4096
"""Width of the weight that is unpacked to measure: beyond any cache, and quantized in a second."""


@dataclass(frozen=True)
class MatmulRate:
    """Floating-point operations per second of a matrix product, by the number of its rows."""

    measured: Mapping[int, float]
    """Operations per second for each number of rows (tokens)."""
    source: str
    """Where the numbers are from, for people."""

    def at(self, rows: int) -> float:
        """Operations per second at `rows` rows, between the measured points in proportion to the logarithm."""
        points = sorted(self.measured.items())
        if rows <= points[0][0]:
            # Few rows leave the time to the reading of the weight, which does not depend on them.
            return points[0][1] * rows / points[0][0]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return points[-1][1]


@dataclass(frozen=True)
class DequantizeRate:
    """Bytes that unpacking a quantized weight reads and writes per second."""

    bytes_per_second: float
    source: str
    """Where the number is from, for people."""


def fixed_rate(operations_per_second: float) -> MatmulRate:
    """A rate that was given instead of measured.

    Raises:
        PacaError: it is not positive.
    """
    if operations_per_second <= 0:
        raise PacaError(f"A rate must be above 0 operations per second, not {operations_per_second}.")
    return MatmulRate({1: operations_per_second}, "as given")


def given_bandwidth(bytes_per_second: float) -> DequantizeRate:
    """A device's memory bandwidth, stated instead of measured: unpacking can't be faster.

    Raises:
        PacaError: it is not positive.
    """
    if bytes_per_second <= 0:
        raise PacaError(f"A bandwidth must be above 0 bytes per second, not {bytes_per_second}.")
    return DequantizeRate(bytes_per_second, "as given")


def measure_rate(device: str, dtype: torch.dtype, features: int, seconds: float = 1.0) -> MatmulRate:
    """Time `(rows, features) @ (features, features)` on `device` for some numbers of rows, `seconds` in all.

    Args:
        device: `"cpu"` or `"cuda"`, which has to be there.
        dtype: of the operands.
        features: the model's hidden size.
        seconds: how long to measure.
    """
    weight = torch.randn(features, features, dtype=dtype, device=device)
    rates = {}
    for rows in ROWS:
        x = torch.randn(rows, features, dtype=dtype, device=device)
        taken = shortest_time(lambda x=x: torch.matmul(x, weight), device, seconds / len(ROWS))  # type: ignore[misc]
        rates[rows] = 2 * rows * features**2 / taken
    return MatmulRate(rates, f"measured on {device_name(device)} in {str(dtype).removeprefix('torch.')}")


def device_name(device: str) -> str:
    """For people."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def shortest_time(work: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest time that `work` took in some repetitions: what the device can do while nothing else runs on it.

    Args:
        work: is run for `seconds`, and at least twice.
        device: `"cpu"` or `"cuda"`.
        seconds: for all of it.
    """

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed() -> float:
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    timed()  # loads the library
    shortest, end = timed(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, timed())
    return shortest


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
    features = min(features, LARGEST_UNPACKED)
    linear = nn.Linear(features, features, bias=False, dtype=dtype, device=device)
    layer = quantized_linear(linear, quantization)
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

"""How fast a device multiplies matrices and unpacks quantized weights: measured, or as given."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from paca.lean.float32_products import faster_in_float32, fastest_products
from paca.messages.errors import PacaError
from paca.messages.import_notes import hold_import_notes
from paca.planning.live_memory import LiveMemory
from paca.pretrained.quantizing import quantized_linear, require_bitsandbytes
from paca.quantized import quantization_of

ROWS = (128, 512, 2048, 8192)
BUSY = 0.5
"""A machine with a load above this many cores is busy: what is measured on it is told with the load."""
LARGEST_UNPACKED = 4096
"""Width of the weight that is unpacked to measure: beyond any cache, and quantized in a second."""


@dataclass(frozen=True)
class MatmulRate:
    """Floating-point operations per second of a matrix product, by the number of its rows."""

    measured: Mapping[int, float]
    """Operations per second for each number of rows (tokens)."""
    source: str
    """Where the numbers are from, for people."""
    load: float | None = None
    """Of the CPU in the minute before it was measured, where the machine was busy."""

    def at(self, rows: int) -> float:
        """Operations per second at `rows` rows, between the measured points in proportion to the logarithm."""
        counts, speeds = zip(*sorted(self.measured.items()), strict=True)
        # Few rows leave the time to the reading of the weight, which does not depend on them.
        return min(1.0, rows / counts[0]) * float(np.interp(math.log(rows), np.log(counts), speeds))


@dataclass(frozen=True)
class DequantizeRate:
    """Bytes that unpacking a quantized weight reads and writes per second."""

    bytes_per_second: float
    source: str
    """Where the number is from, for people."""


def fixed_rate(operations_per_second: float) -> MatmulRate:
    """A rate that was given instead of measured; PacaError if it is not positive."""
    if operations_per_second <= 0:
        raise PacaError(f"A rate must be above 0 operations per second, not {operations_per_second}.")
    return MatmulRate({1: operations_per_second}, "as given")


def given_bandwidth(bytes_per_second: float) -> DequantizeRate:
    """A memory bandwidth, stated instead of measured: unpacking can't be faster. PacaError if it is not positive."""
    if bytes_per_second <= 0:
        raise PacaError(f"A bandwidth must be above 0 bytes per second, not {bytes_per_second}.")
    return DequantizeRate(bytes_per_second, "as given")


def measure_rate(device: str, dtype: torch.dtype, features: int, seconds: float = 1.0) -> MatmulRate:
    """Time `(rows, features) @ (features, features)` on `device` for some numbers of rows, `seconds` in all."""
    load = _load() if device == "cpu" else None
    weight = torch.randn(features, features, dtype=dtype, device=device)
    rates = {}
    with fastest_products(weight.device, dtype):  # as a run makes them
        for rows in ROWS:
            x = torch.randn(rows, features, dtype=dtype, device=device)
            taken = _shortest_time(lambda x=x: torch.matmul(x, weight), seconds / len(ROWS))  # type: ignore[misc]
            rates[rows] = 2 * rows * features**2 / taken
    how = ", products in float32" if faster_in_float32(weight.device, dtype) else ""
    return MatmulRate(rates, f"measured on {_device_name(device)} in {str(dtype).removeprefix('torch.')}{how}", load)


def measure_dequantize_rate(
    device: str, dtype: torch.dtype, features: int, quantization: str, seconds: float = 0.5
) -> DequantizeRate:
    """Time the unpacking of a `(features, features)` weight to `dtype`, as a training step does it, on a device that is
    here.

    Args:
        device: `"cpu"` or `"cuda"`.
        dtype: That it is unpacked to.
        features: The model's hidden size.
        quantization: As `MemoryEstimate.weights` names it: `"nf4"`, `"int8"`, `"nf4 without double quantization"`.
        seconds: How long to measure.
    """
    require_bitsandbytes(quantization)
    features = min(features, LARGEST_UNPACKED)
    layer = quantized_linear(nn.Linear(features, features, bias=False, dtype=dtype, device=device), quantization)
    kind = quantization_of(layer)
    assert kind is not None
    unpack = kind.weight_and_columns
    positions = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        with LiveMemory() as memory:
            unpack(layer, dtype, positions)
        rate = memory.dequantized / _shortest_time(lambda: unpack(layer, dtype, positions), seconds)
    return DequantizeRate(rate, f"measured on {_device_name(device)} with {quantization}")


def _load() -> float | None:
    """Of the last minute, if it is above `BUSY`; None also where the system does not tell it, as Windows does not."""
    with suppress(AttributeError, OSError):
        return load if (load := os.getloadavg()[0]) > BUSY else None
    return None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _shortest_time(work: Callable[[], Any], seconds: float) -> float:
    """The shortest of some repetitions within `seconds`: what the device can do while nothing else runs on it.

    Also with one thread: on a busy machine each of several waits for those that have no core.
    """
    with hold_import_notes():  # here: where torch is built for CUDA, and there is none, its import writes a line
        from torch.utils.benchmark import Timer
    timers = [Timer("work()", globals={"work": work}, num_threads=n) for n in {torch.get_num_threads(), 1}]
    return min(min(timer.blocked_autorange(min_run_time=seconds / len(timers)).times) for timer in timers)

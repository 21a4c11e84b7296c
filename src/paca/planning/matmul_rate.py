"""How fast a device multiplies matrices, measured."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paca.messages.errors import PacaError

ROWS = (128, 512, 2048, 8192)


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


def fixed_rate(operations_per_second: float) -> MatmulRate:
    """A rate that was given instead of measured.

    Raises:
        PacaError: it is not positive.
    """
    if operations_per_second <= 0:
        raise PacaError(f"A rate must be above 0 operations per second, not {operations_per_second}.")
    return MatmulRate({1: operations_per_second}, "as given")


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
        rates[rows] = 2 * rows * features**2 / _product_time(x, weight, seconds / len(ROWS))
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

    def timed() -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    timed()  # loads the library
    shortest, end = timed(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        shortest = min(shortest, timed())
    return shortest


def _product_time(x: torch.Tensor, weight: torch.Tensor, seconds: float) -> float:
    return shortest_time(lambda: torch.matmul(x, weight), x.device.type, seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

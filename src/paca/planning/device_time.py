"""How long a training step would take on a device that is not here: a simulation, never a measurement.

Each operator of the step takes the longer of its operations over the rate that the device reaches at that shape, and
its bytes over the bandwidth. The host launches operators one after the other; where that takes longer, the device
waits. What is not in a data sheet is in `Efficiency`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paca.planning.devices import Device
from paca.planning.operators import Operator

PHASES = ("forward", "backward", "step")
_TILES = ((256, 128, 1.0), (128, 128, 0.92), (128, 64, 0.8), (64, 64, 0.6))
"""Rows and columns that one multiprocessor computes at a time, and the rate at which it does."""
_SHORTEST_SUM = 512
"""Where there are fewer tiles than multiprocessors, a product's sum is split, into parts of at least this length."""


@dataclass(frozen=True)
class Efficiency:
    """What a data sheet does not say. docs/notes/plan-on.md says where each number is from."""

    product: float = 0.74
    """Share of the peak that a large matrix product reaches."""
    bandwidth: float = 0.8
    """Share of the memory's bandwidth that other operators reach."""
    cache_bandwidth: float = 3e12
    """Bytes per second of an operator, other than a product, whose tensors fit into half of the last cache."""
    kernel: float = 6e-6
    """Seconds that the device needs for the smallest operator, with the gap before it."""
    host_forward: float = 12e-6
    """Seconds of the host for each operator that is launched in a forward pass: Python, autograd and launch."""
    host_backward: float = 9e-6
    """The same in the backward pass, which autograd runs without Python, and in the optimizer's step."""
    view: float = 2e-6
    """Seconds of the host for an operator that launches nothing."""
    listed: float = 1e-6
    """Seconds of the host for each further tensor of an operator that works on a list."""


@dataclass(frozen=True)
class StepTime:
    """Simulated seconds of one optimizer step."""

    device: float
    """The device's work alone."""
    host: float
    """The host's work alone."""
    total: float
    """Of the step: in each phase the device or the host is waited for."""
    waits: int
    """How often the host waits for the device in the middle of it."""

    @property
    def launch_bound(self) -> float:
        """Share of the step in which the device waits for the host."""
        return 1 - self.device / self.total


def step_time(operators: Mapping[Operator, int], device: Device, efficiency: Efficiency | None = None) -> StepTime:
    """The time of a step that runs `operators` (as in `MemoryEstimate`) on `device`."""
    efficiency = efficiency or Efficiency()
    works, hosts = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
    waits = 0
    for operator, count in operators.items():
        works[operator.phase] += count * device_seconds(operator, device, efficiency)
        hosts[operator.phase] += count * host_seconds(operator, efficiency)
        waits += count * operator.waits
    total = sum(max(works[phase], hosts[phase]) for phase in PHASES)
    return StepTime(sum(works.values()), sum(hosts.values()), total, waits)


def device_seconds(operator: Operator, device: Device, efficiency: Efficiency) -> float:
    """Seconds of the device for one operator."""
    if not operator.launches:
        return 0.0
    rate = device.bandwidth * efficiency.bandwidth
    if operator.product is None and operator.bytes <= device.cache / 2:
        rate = max(rate, efficiency.cache_bandwidth)
    return max(_computing(operator, device, efficiency), operator.bytes / rate) + efficiency.kernel


def host_seconds(operator: Operator, efficiency: Efficiency) -> float:
    """Seconds of the host for one operator."""
    if not operator.launches:
        return efficiency.view
    launch = efficiency.host_forward if operator.phase == "forward" else efficiency.host_backward
    return launch + efficiency.listed * (operator.tensors - 1)


def _computing(operator: Operator, device: Device, efficiency: Efficiency) -> float:
    if not operator.flops or operator.dtype is None:
        return 0.0
    peak = device.peak_of(operator.dtype)
    if operator.attention:
        return operator.flops / (peak * device.attention)
    share = 1.0 if operator.product is None else tile_share(operator.product, device.units)
    return operator.flops / (peak * efficiency.product * share)


def tile_share(product: tuple[int, int, int, int], units: int) -> float:
    """Share of the best rate that a matrix product of a shape reaches, as its tiles fill `units` multiprocessors.

    Args:
        product: Batch, rows, columns, and the length of the sum.
    """
    return max(_shares(product, units))


def _shares(product: tuple[int, int, int, int], units: int) -> Iterable[float]:
    batch, rows, columns, length = product
    for tall, wide, rate in _TILES:
        for high, broad in ((tall, wide), (wide, tall)):
            tiles = batch * math.ceil(rows / high) * math.ceil(columns / broad)
            filled = batch * rows * columns / (tiles * high * broad)
            parts = max(1, min(units // tiles, length // _SHORTEST_SUM)) if tiles < units else 1
            rounds = math.ceil(tiles * parts / units)
            yield rate * filled * tiles * parts / (rounds * units)

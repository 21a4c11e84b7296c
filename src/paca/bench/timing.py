"""Timing several methods in one process, round by round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from paca.bench.compilation import graphs_compiled
from paca.bench.device import clock, is_out_of_memory
from paca.bench.step import TrainingStep




@dataclass
class Timing:
    """What the rounds gave for one method."""

    seconds: list[float] = field(default_factory=list)
    """One sample per round: seconds per step."""
    graphs: int = 0
    """Graphs that torch.compile made in the warm-up."""
    recompilations: int = 0
    """Graphs that it made after the warm-up."""
    failure: str | None = None
    """Why the method could not be timed."""


def time_rounds(
    steps: Mapping[str, TrainingStep], *, rounds: int, warmup: int, steps_per_round: int, device: torch.device
) -> dict[str, Timing]:
    """Time every step once per round, in an order that rotates from round to round.

    A method that runs out of memory keeps no samples and says so; the others go on. Garbage is collected between the
    samples, never within one.

    Args:
        steps: what to time, by name.
        rounds: samples per method.
        warmup: steps per method before the first round.
        steps_per_round: a sample is the mean of so many steps.
        device: where they run.
    """
    timings = {name: Timing() for name in steps}
    running = dict(steps)
    for name, step in steps.items():
        _attempt(running, timings, name, lambda step=step: _warm_up(step, warmup))  # type: ignore[misc]
    for number in range(rounds):
        names = [name for name in steps if name in running]
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            step = running[name]
            _attempt(
                running,
                timings,
                name,
                lambda step=step: _sample(step, steps_per_round, device),  # type: ignore[misc]
            )
    return timings


def _attempt(
    running: dict[str, TrainingStep],
    timings: dict[str, Timing],
    name: str,
    work: Callable[[], tuple[float | None, int]],
) -> None:
    timing = timings[name]
    try:
        seconds, graphs = work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        del running[name]
        timings[name] = Timing(failure="out of memory")
        return
    if seconds is None:
        timing.graphs = graphs
    else:
        timing.seconds.append(seconds)
        timing.recompilations += graphs


def _warm_up(step: TrainingStep, count: int) -> tuple[None, int]:
    before = graphs_compiled()
    for _ in range(count):
        step.run()
    return None, graphs_compiled() - before


def _sample(step: TrainingStep, count: int, device: torch.device) -> tuple[float, int]:
    gc.collect()
    gc.disable()
    graphs = graphs_compiled()
    try:
        start = clock(device)
        for _ in range(count):
            step.run()
        seconds = (clock(device) - start) / count
    finally:
        gc.enable()
    return seconds, graphs_compiled() - graphs

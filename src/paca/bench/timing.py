"""Timing several methods in one process, round by round."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field

from paca.bench.compilation import graphs_compiled
from paca.bench.step import TrainingStep
from paca.messages.out_of_memory import failure_reason


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
    """Why the method has no samples."""
    interrupted: bool = False
    """Whether Ctrl-C ended the rounds early; the samples are those of the whole rounds before it."""


def time_rounds(
    steps: Mapping[str, TrainingStep], *, rounds: int, warmup: int, steps_per_round: int
) -> dict[str, Timing]:
    """Time every step once per round, in an order that rotates from round to round.

    A method that fails (out of memory, not compilable) loses its samples and says why; the others go on. Garbage is
    collected between the samples, never within one. Ctrl-C after a whole round keeps the rounds there are.

    Args:
        steps: What to time, by name.
        rounds: Samples per method.
        warmup: Steps per method before the first round.
        steps_per_round: A sample is the mean of so many steps.
    """
    timings = {name: Timing() for name in steps}
    running = list(steps)
    for name in steps:
        try:
            before = graphs_compiled()
            for _ in range(warmup):
                steps[name].run()
            timings[name].graphs = graphs_compiled() - before
        except Exception as error:  # whatever one method throws, the others are measured
            timings[name] = Timing(failure=failure_reason(error))
            running.remove(name)
        if timings[name].failure:
            steps[name].abandon()
    for number in range(rounds):
        try:
            _round(steps, running, timings, steps_per_round)
        except KeyboardInterrupt:
            if number == 0:
                raise
            for timing in timings.values():
                del timing.seconds[number:]
                timing.interrupted = True
            break
        running = running[1:] + running[:1]
    return timings


def _round(steps: Mapping[str, TrainingStep], running: list[str], timings: dict[str, Timing], count: int) -> None:
    for name in list(running):
        try:
            seconds, graphs = _sample(steps[name], count)
            timings[name].seconds.append(seconds)
            timings[name].recompilations += graphs
        except Exception as error:
            timings[name] = Timing(failure=failure_reason(error))
            running.remove(name)
        if timings[name].failure:  # not in the except clause: there the error still holds the graph
            steps[name].abandon()


def _sample(step: TrainingStep, count: int) -> tuple[float, int]:
    gc.collect()
    gc.disable()
    graphs = graphs_compiled()
    try:
        start = step.clock()
        for _ in range(count):
            step.run()
        seconds = (step.clock() - start) / count
    finally:
        gc.enable()
    return seconds, graphs_compiled() - graphs

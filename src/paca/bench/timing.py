"""Timing several methods in one process, round by round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch._dynamo.utils import counters

from paca.bench.step import TrainingStep
from paca.pretrained.out_of_memory import failure_reason


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    return int(counters["stats"]["unique_graphs"])


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


def time_rounds(steps: Mapping[str, TrainingStep], *, rounds: int, warmup: int) -> dict[str, Timing]:
    """Time every step once per round, in an order that rotates from round to round, after `warmup` steps of each.

    A method that fails (out of memory, not compilable) loses its samples and says why; the others go on. Garbage is
    collected between the samples, never within one. Ctrl-C after a whole round keeps the rounds there are.
    """
    timings = {name: Timing() for name in steps}
    running = list(steps)

    def attempt(name: str, work: Callable[[TrainingStep, Timing], None]) -> None:
        try:
            work(steps[name], timings[name])
        except Exception as error:  # whatever one method throws, the others are measured
            timings[name] = Timing(failure=failure_reason(error))
        if timings[name].failure:  # not in the except clause: there the error still holds the graph
            running.remove(name)
            steps[name].abandon()

    def warm_up(step: TrainingStep, timing: Timing) -> None:
        before = graphs_compiled()
        for _ in range(warmup):
            step.run()
        timing.graphs = graphs_compiled() - before

    for name in steps:
        attempt(name, warm_up)
    for number in range(rounds):
        try:
            for name in list(running):
                attempt(name, _sample)
        except KeyboardInterrupt:
            if number == 0:
                raise
            for timing in timings.values():
                del timing.seconds[number:]
                timing.interrupted = True
            break
        running = running[1:] + running[:1]
    return timings


def _sample(step: TrainingStep, timing: Timing) -> None:
    gc.collect()
    gc.disable()
    graphs = graphs_compiled()
    try:
        start = step.clock()
        step.run()
        timing.seconds.append(step.clock() - start)
    finally:
        gc.enable()
    timing.recompilations += graphs_compiled() - graphs

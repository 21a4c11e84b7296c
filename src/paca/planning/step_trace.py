"""What was seen of one training step without values, and the parts of its memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from paca.planning.operators import Operator

WEIGHTS = "weights"
ORIGINAL_COLUMNS = "original columns"
TRAINABLE = "trainable parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
ACTIVATIONS = "activations: "
LOSS = "logits and loss"
TEMPORARIES = "temporaries"


@dataclass
class StepTrace:
    """What one forward and backward pass of a model holds, in bytes."""

    saved: Counter[str] = field(default_factory=Counter)
    """What the graph holds when the forward pass has ended, by kind, without parameters."""
    peaks: dict[str, Counter[str]] = field(default_factory=dict)
    """For each stretch of the step, everything that is allocated at its fullest moment, by category."""
    operators: Counter[Operator] = field(default_factory=Counter)
    """How often each operator runs; without `timed`, those alone that have `flops`. In a sum of traces a count may be
    negative; what is linear in it is right."""
    dequantized: int = 0
    """Bytes read and written to unpack quantized weights, in both."""

    @property
    def flops(self) -> int:
        """Of the forward and the backward pass."""
        return sum(operator.flops * count for operator, count in self.operators.items())

    def plus(self, more: StepTrace, less: StepTrace, times: int) -> StepTrace:
        """`self + times * (more - less)`, everywhere."""
        nothing: Counter[str] = Counter()
        peaks = {
            name: _line(times, *(trace.peaks.get(name, nothing) for trace in (self, more, less)))
            for name in self.peaks | more.peaks
        }
        return StepTrace(
            _line(times, self.saved, more.saved, less.saved),
            peaks,
            _line(times, self.operators, more.operators, less.operators),
            self.dequantized + times * (more.dequantized - less.dequantized),
        )


Key = TypeVar("Key")


def _line(times: int, start: Counter[Key], more: Counter[Key], less: Counter[Key]) -> Counter[Key]:
    keys = {*start, *more, *less}
    return Counter({key: start[key] + times * (more[key] - less[key]) for key in keys})

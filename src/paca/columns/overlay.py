"""Overlaid columns: the trained columns of a layer whose weight is not written, quantized or elsewhere.

The counterpart of ``ResidentColumns`` where nothing is resident: it knows which columns the next forward pass has to
see, and names each set of them, so that a repeated or late pass with others is noticed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from paca.columns.recomputation import ForwardPasses
from paca.columns.state import Columns, State


class OverlaidColumns:
    """What lies over one weight. Holds no reference to the weight or its module."""

    def __init__(self) -> None:
        self.wanted: tuple[Columns, ...] = ()
        """What the next forward pass has to see."""
        self._generation = 0  # counts the changes of the weight beneath the columns
        self.state = State((), 0)
        """What the latest forward pass saw."""
        self._passes = ForwardPasses()

    def want(self, columns: tuple[Columns, ...]) -> None:
        """Say what the next forward pass has to see."""
        self.wanted = columns

    def forget(self, delta: Tensor) -> None:
        """Drop what is remembered of a deleted adapter."""
        if any(c.delta is delta for c in self.state.columns):
            self.state = State((), self._generation)

    def begin_generation(self) -> None:
        """Note that the weight beneath the columns was changed (a merge)."""
        self._generation += 1
        self.state = State((), self._generation)

    def write_parked(self, write: Callable[[], None]) -> None:
        """Call ``write``, which replaces deltas and indices in place; passes before it are told from those after it."""
        write()
        self.begin_generation()

    def note_forward(self) -> State:
        """The state that a forward pass sees now.

        Raises:
            RuntimeError: if activation checkpointing repeats a pass that had another one.
        """
        if not self.state.holds(self.wanted):
            self.state = State(self.wanted, self._generation)
        self._passes.note(self.state)
        return self.state

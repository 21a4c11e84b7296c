"""Mixed batches: which sample of a batch has which adapter, while a forward pass of it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

BASE = "__base__"
"""The name that PEFT gives to the model without an adapter."""


class MixedBatch:
    """Which sample of a batch runs with which adapter: one name per sample, `"__base__"` for none. Where generation
    `repeats` each sample (beams, several answers), those of a layer's input may be repeated so, or not (an encoder's).
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names = tuple(names)
        self.repeats = repeats
        self.tag = hash((self.names, repeats))
        self.adapter = BASE
        """Whose columns a layer that can't tell samples apart has to run with now."""
        self.samples_before: dict[str, tuple[int, int]] = {}
        """Per experts module, samples and length of what the block around it got last."""
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def names_of(self, samples: int) -> tuple[str, ...]:
        """The adapters of a layer's input that has `samples` of them, in its order; `ValueError` if there are not as
        many."""
        if samples == len(self.names):
            return self.names
        if samples == len(self.names) * self.repeats:
            return tuple(name for name in self.names for _ in range(self.repeats))
        repeated = f", each repeated {self.repeats} times," if self.repeats > 1 else ""
        raise ValueError(
            f"adapter_names gives {len(self.names)} names{repeated} for an input with {samples} samples. Give one name "
            f"per sample, {BASE!r} for the base model. (A layer that sees single tokens instead of samples, such as a "
            "router of experts, or one row for all samples, such as position embeddings, can't run a mixed batch.)"
        )

    def rows_of(self, samples: int, device: torch.device) -> dict[str, Tensor]:
        """Per adapter, the numbers of its samples, `(samples of it,)` int64 on `device`; without `"__base__"`."""
        key = (samples, device)
        if key not in self._rows:  # once per batch, not once per layer
            groups: dict[str, list[int]] = {}
            for number, name in enumerate(self.names_of(samples)):
                groups.setdefault(name, []).append(number)
            groups.pop(BASE, None)
            self._rows[key] = {name: torch.tensor(rows, device=device) for name, rows in groups.items()}
        return self._rows[key]


class Running:
    """How many mixed batches run in the process: what compiled graphs look at, which are then run by the layers."""

    count = 0


_CURRENT: ContextVar[MixedBatch | None] = ContextVar("paca_mixed_batch", default=None)
_COUNTING = threading.Lock()


def current_mixed_batch() -> MixedBatch | None:
    """The mixed batch that this thread is running, if any."""
    return _CURRENT.get()


@contextmanager
def running(batch: MixedBatch) -> Iterator[None]:
    """Make `batch` the current one of this thread; other threads don't see it."""
    token = _CURRENT.set(batch)
    with _COUNTING:
        Running.count += 1
    try:
        yield
    finally:
        with _COUNTING:
            Running.count -= 1
        _CURRENT.reset(token)


class StepUnderway(RuntimeError):
    """A weight that doesn't hold what a pass wants can't be written: another thread is in a step of its deltas."""

    def __init__(self) -> None:
        super().__init__(
            "The weights hold no or other columns (adapter_names, a state dict, a copy), and can't be written during "
            "the optimizer's step of another thread. Run this pass again."
        )


def after_steps(run: Callable[[], _T], seconds: float = 60) -> _T:
    """`run()`, again while it raises `StepUnderway`; after so many `seconds`, raise that."""
    end = time.monotonic() + seconds
    while True:
        try:
            return run()
        except StepUnderway:
            if time.monotonic() > end:
                raise
            time.sleep(1e-3)

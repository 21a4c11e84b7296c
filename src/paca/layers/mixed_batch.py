"""Mixed batches: which sample of a batch has which adapter, while a forward pass of it runs."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paca.columns.entry import Entry
from paca.columns.lost import is_on_the_stack
from paca.columns.resident import WRITING

_T = TypeVar("_T")
_LEFT_MEANWHILE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

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
        self.gathered: set[object] = set()
        """Columns whose gathered deltas it brought up to date (FSDP2): nobody writes them as long as it runs."""
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self.entry: Entry | None = None
        """Of the model that it runs through."""
        self.members: frozenset[int] | None = None
        """The ids of that model's modules: another model may be called meanwhile. None for a layer that runs alone."""
        self.thread = threading.get_ident()
        self.call: FrameType | None = None
        """What is on its thread's stack as long as it runs."""

    def begin(self) -> None:
        """Called before it runs; writes of other threads wait."""

    def end(self) -> None:
        """Undo `begin`, also where that did only a part, and where a part is undone."""

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
    """The mixed batches that run in the process."""

    count = 0
    """How many: what compiled graphs look at, which are then run by the layers."""
    batches: tuple[MixedBatch, ...] = ()


def current_mixed_batch(module: object = None) -> MixedBatch | None:
    """The mixed batch that this thread is running through `module` (None: through any), the innermost, if any."""
    thread = threading.get_ident()
    for batch in reversed(Running.batches):
        if batch.thread == thread and (module is None or batch.members is None or id(module) in batch.members):
            return batch
    return None


@contextmanager
def running(batch: MixedBatch) -> Iterator[None]:
    """Make `batch` the current one of this thread; other threads don't see it.

    Ctrl-C may come at any line. So the batch is on the list before anything else is done, and until all is undone:
    there `end_left_over` finds it.
    """
    batch.call = _call_below(sys._getframe())
    try:
        with WRITING:
            if batch.entry is not None:  # before a weight is parked: each layer looks which columns are wanted
                batch.entry.unwritten = True
            Running.batches = (*Running.batches, batch)
            Running.count = len(Running.batches)
            batch.begin()
        yield
    finally:
        _end(batch)


def _end(batch: MixedBatch) -> None:
    with WRITING:
        batch.end()
        left = tuple(other for other in Running.batches if other is not batch)
        Running.count = len(left)
        Running.batches = left
        batch.call = None


def end_left_over() -> None:
    """End mixed batches of this thread whose call is over: Ctrl-C came in `running`, or on the way to it."""
    batch = current_mixed_batch()
    while batch is not None and batch.call is not None and not is_on_the_stack(batch.call):
        _end(batch)
        batch = current_mixed_batch()


def end_those_of_other_threads() -> None:
    """End the mixed batches of threads that a forked process does not have."""
    for batch in Running.batches:
        if batch.thread != threading.get_ident():
            _end(batch)


def _call_below(frame: FrameType | None) -> FrameType | None:
    """The call whose `with` statement enters the context manager that runs in `frame`, through PEFT's own. None where
    its end does not end the batch: a generator is left and entered again, an exit stack may outlive who filled it."""
    entering = ("running", "__enter__", "_enable_peft_forward_hooks")
    while frame is not None and frame.f_code.co_name in entering:
        frame = frame.f_back
    if frame is None or frame.f_code.co_name == "enter_context" or frame.f_code.co_flags & _LEFT_MEANWHILE:
        return None
    return frame


def adding(module: nn.Module, add: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """The same module (its attributes, its hooks) with `add(output, input)` in place of its output: its hooks run
    around that, as they run around columns in its weight. For one pass. Tables of modules find the module by it."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return add(super(cls, self).forward(x, *args, **kwargs), x)

    kind = type(module)
    same = {"__hash__": lambda self: hash(module), "__eq__": lambda self, other: other is self or other is module}
    cls: Any = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, **same})
    alias: nn.Module = cls.__new__(cls)
    alias.__dict__ = module.__dict__
    return alias


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

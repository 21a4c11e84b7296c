"""What the columns of a weight know of the model they are in."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from paca.columns.state import THREAD


class Entry:
    """What a compiled graph looks at before it reads the weights of a model (`paca.tuner.entry`)."""

    unwritten = False
    """Some weight does not hold what is active just now: a state dict or a copy was taken, or a backward pass put the
    columns of its forward pass back."""
    sharded = False  # FSDP2 shards some of its weights
    mark: object  # stands for it where a pass is noted: one that Ctrl-C ended stays there, and must not keep a model
    seen: tuple[bool, bool] | None = None
    """Grad mode and `training` of the model's last pass, in any thread; None once layers ran without it in others."""
    since: object = None  # stands for the first of its passes in that mode

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # which parking weights may change, while it is copied


class _Seen(threading.local):
    def __init__(self) -> None:
        self.modes: weakref.WeakKeyDictionary[Any, tuple[bool, bool]] = weakref.WeakKeyDictionary()  # of entries
        self.alone: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of columns


SEEN_HERE = _Seen()
"""What a thread's own last passes were: each new one looks as well."""


def in_other_mode(columns: Any, training: bool) -> bool:
    """Whether a layer that runs without its model did so in another mode before, or its model did since."""
    entry, mode = columns.entry, (torch.is_grad_enabled(), training)
    if entry is None or THREAD.passes or torch._C._current_graph_task_id() != -1:
        return False
    if entry.seen == mode == SEEN_HERE.modes.get(entry):
        return False
    now = entry.since, mode
    before, here = columns.alone, SEEN_HERE.alone.get(columns)
    columns.alone = SEEN_HERE.alone[columns] = now
    entry.seen = None
    return not before == now == here

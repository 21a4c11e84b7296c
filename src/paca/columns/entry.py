"""What the columns of a weight know of the model they are in."""

from __future__ import annotations

from typing import Any


class Entry:
    """What a compiled graph looks at before it reads the weights of a model (`paca.tuner.entry`)."""

    unwritten = False
    """Some weight does not hold what is active just now: a state dict or a copy was taken, or a backward pass put the
    columns of its forward pass back."""
    sharded = False  # FSDP2 shards some of its weights
    mark: object  # stands for it where a pass is noted: one that Ctrl-C ended stays there, and must not keep a model

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # which parking weights may change, while it is copied

"""Choices that all processes of a run have to share."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

Choice = TypeVar("Choice")


def same_on_all_ranks(choice: Choice) -> Choice:
    """The choice of the first process, in every process of the run; all have to call this at the same time."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return choice
    box = [choice]
    distributed.broadcast_object_list(box)
    return box[0]

"""What is evaluated beside each other, and who is told how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from paca.pretrained.generation import LoadedModel  # imports torch

BASE, ADAPTER, MODEL = "base", "adapter", "model"
"""The names of what is evaluated: with an adapter the first two (or the second), else the third."""


def sides_of(loaded: LoadedModel) -> tuple[str, ...]:
    """What of a model is evaluated: not what an adapter leaves that changed its base."""
    from paca.pretrained.changed_base import left_on

    if loaded.adapter is None:
        return (MODEL,)
    return (BASE, ADAPTER) if left_on(loaded.model) is None else (ADAPTER,)


class Watcher(Protocol):
    """Shows how far an evaluation is."""

    def begin(self, who: str, what: str, total: int) -> None:
        """So many answers of one kind are to be computed; those that were kept are not counted."""

    def advance(self) -> None:
        """One more is there."""

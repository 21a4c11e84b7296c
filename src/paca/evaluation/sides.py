"""What is evaluated beside each other, and who is told how far it is."""

from __future__ import annotations

from pathlib import Path
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


def told_of_base(run: str | Path) -> str | None:
    """What to say of a run that trained on from an adapter, where base and result are side by side; else None."""
    from paca.training.config.strict_yaml import read_yaml

    file = Path(run, "config.yaml")
    first = read_yaml(file)[0]["model"].get("adapter") if file.is_file() else None
    return None if first is None else f"base: the model without any adapter. The run began with {first}."


class Watcher(Protocol):
    """Shows how far an evaluation is."""

    def begin(self, who: str, what: str, total: int, at_a_time: int = 1) -> None:
        """So many answers of one kind are to be computed, in batches; those that were kept are not counted."""

    def advance(self) -> None:
        """One more is there."""

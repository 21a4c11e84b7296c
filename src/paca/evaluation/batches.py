"""A model's work a few pieces at a time, the longest first: memory that does not suffice shows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def longest_first(
    run: Callable[[list[Item]], list[Result]], items: Sequence[Item], length: Callable[[Item], int], batch_size: int
) -> list[Result]:
    """What `run` makes of `items`, given to it `batch_size` at a time; in the order of `items`."""
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    found: dict[int, Result] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found.update(zip(chosen, run([items[index] for index in chosen]), strict=True))
    return [found[index] for index in range(len(items))]


def context_of(model: Any) -> int | None:
    """How many tokens a model was made to read, where it says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)

"""A model's work a few pieces at a time, the longest first: memory that does not suffice shows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from paca.evaluation.kept_lines import KeptAnswers

Item = TypeVar("Item")
Result = TypeVar("Result")


def longest_first(
    run: Callable[[list[Item]], list[Result]],
    items: Sequence[Item],
    length: Callable[[Item], int],
    batch_size: int,
    what: str,
    kept: KeptAnswers | None = None,
) -> list[Result]:
    """What `run` makes of `items`, given to it `batch_size` at a time; in the order of `items`.

    With `kept`, which calls the results `what`, only of those that it has none of; theirs come as JSON has them.
    """
    found: dict[int, Result] = {} if kept is None else kept.begin(what, items, batch_size)
    missing = (index for index in range(len(items)) if index not in found)
    order = sorted(missing, key=lambda index: -length(items[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for index, result in zip(chosen, run([items[index] for index in chosen]), strict=True):
            found[index] = result
            if kept is not None:
                kept.add(what, items[index], result)
    return [found[index] for index in range(len(items))]

"""A part of a data set that stands for all of it."""

from __future__ import annotations

from datasets import Dataset


def even_places(count: int, limit: int | None) -> list[int]:
    """Of `count` places, at most `limit` at equal distances, in their order; all of them where it is None."""
    taken = count if limit is None else min(count, limit)
    return [index * count // taken for index in range(taken)]


def spread_evenly(dataset: Dataset, limit: int | None) -> Dataset:
    """At most `limit` rows, at equal distances, in their order; all of them where it is None.

    Files are often sorted, by label or by difficulty. Their first rows would stand for one kind alone.
    """
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(even_places(len(dataset), limit))

"""Examples that are there more than once. What held-out ones measure that are trained on as well is how well they were
learnt by heart; copies to train on count more than others."""

from __future__ import annotations

import json
from collections.abc import Iterator

from datasets import Dataset, Image

from paca.data.choices import OPTIONS
from paca.data.conversion import ORIGIN

_BESIDE = {ORIGIN, OPTIONS}
"""Columns that make no other example of the same texts."""
MOST = 200_000
"""Training examples that are gone through; with more, nothing is looked for: it would take seconds."""

SEARCHED = 20_000
"""Training examples among which copies are looked for, the first ones: about 0.03 ms each of 1,000 characters."""
_FEW = 0.03
"""Share of copies that is not told."""


def shared(train: Dataset, held_out: Dataset) -> int:
    """How many held-out examples are in the training data, word for word; images by their files.

    0 also for large data, and for images that lie in a table.
    """
    if _holds_images(train) or len(train) > MOST:
        return 0
    seen = set(_texts(train))
    return sum(text in seen for text in _texts(held_out))


def told_of_copies(train: Dataset) -> str:
    """How many training examples, at least of the first ones, are word for word as earlier ones, for a description;
    empty where they are few, and for images that lie in a table."""
    looked_at = train.select(range(min(SEARCHED, len(train))))
    count = 0 if _holds_images(train) else len(looked_at) - len(set(_texts(looked_at)))
    if count <= _FEW * len(looked_at):
        return ""
    which = "them" if len(looked_at) == len(train) else f"the first {len(looked_at):,}"
    share = 100 * count / len(looked_at)
    return f"; {count:,} of {which} ({share:.0f} %) {'are copies' if count > 1 else 'is a copy'} of earlier ones"


def _holds_images(dataset: Dataset) -> bool:
    """Whether images lie in the table, not in files."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    return any(dataset[0][name]["bytes"] is not None for name in images)


def _texts(dataset: Dataset) -> Iterator[int]:
    columns = [name for name in dataset.column_names if name not in _BESIDE]
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = {name: value for name, value in zip(batch, values, strict=True) if value is not None}
            if all(isinstance(row.get(name), list) for name in ("prompt", "completion")):  # the same, as a conversation
                row["messages"] = row.pop("prompt") + row.pop("completion")
            yield hash(json.dumps(row, sort_keys=True, default=str))

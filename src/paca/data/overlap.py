"""Held-out examples that are trained on as well: what they measure is how well they were learnt by heart."""

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


def shared(train: Dataset, held_out: Dataset) -> int:
    """How many held-out examples are in the training data, word for word; images by their files.

    0 also for large data, and for images that lie in a table.
    """
    images = [name for name, feature in train.features.items() if isinstance(feature, Image)]
    inside = any(train[0][name]["bytes"] is not None for name in images)
    if inside or len(train) > MOST:
        return 0
    seen = set(_texts(train))
    return sum(text in seen for text in _texts(held_out))


def _texts(dataset: Dataset) -> Iterator[int]:
    columns = [name for name in dataset.column_names if name not in _BESIDE]
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            row = {name: value for name, value in zip(batch, values, strict=True) if value is not None}
            if all(isinstance(row.get(name), list) for name in ("prompt", "completion")):  # the same, as a conversation
                row["messages"] = row.pop("prompt") + row.pop("completion")
            yield hash(json.dumps(row, sort_keys=True, default=str))

"""The system message that all examples begin with."""

from __future__ import annotations

import json

from datasets import Json, List

from paca.data.examples import Examples


def shared_system(examples: Examples) -> str | None:
    """The text, where each conversation begins with the same one; else None."""
    column = "messages" if "messages" in examples.dataset.features else "prompt"
    if examples.dataset.features.get(column) != List(Json()):
        return None
    found: set[str | None] = set()
    for batch in examples.dataset.select_columns(column).with_format("arrow").iter(batch_size=1000):
        rows = batch[column].combine_chunks()
        if 0 in rows.value_lengths().to_pylist():
            return None
        found.update(map(_said_by_system, set(rows.values.take(rows.offsets[:-1]).to_pylist())))
        if len(found) > 1 or None in found:
            return None
    return found.pop() if found else None


def _said_by_system(message: str) -> str | None:
    read = json.loads(message)
    return read["content"] if read["role"] == "system" and isinstance(read["content"], str) else None

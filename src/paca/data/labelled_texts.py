"""Texts with a label each: what a classifier learns from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from paca.data.formats import Example, Format, some_text
from paca.data.rows import Row
from paca.messages.errors import NothingToLearn, PacaError


def _labelled(column: str) -> Callable[[Row], Example]:
    def convert(row: Row) -> Example:
        text, label = some_text(row[column], column), row["label"]
        label = label.strip() if isinstance(label, str) else label  # a space after a comma of a CSV file is no class
        if not isinstance(label, (str, int)) or label == "":
            given = "missing" if label is None else repr(label)
            error = NothingToLearn if label in (None, "") else PacaError
            raise error(f"label is {given}; expected a name or a whole number.")
        return {"text": text, "label": label if isinstance(label, str) else json.dumps(label)}

    return convert


def label_names(labels: Iterable[str]) -> list[str]:
    """Every label once: whole numbers by value, then names by alphabet."""
    return sorted(set(labels), key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


LABELLED_TEXTS = {
    form.name: form
    for form in (
        Format("text-label", ("text", "label"), (), _labelled("text")),
        Format("sentence-label", ("sentence", "label"), (), _labelled("sentence")),
    )
}

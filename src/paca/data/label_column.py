"""The column with the label of each image, the same for every kind of source: class labels, names, or whole numbers."""

from __future__ import annotations

import datasets

from paca.data.labelled_texts import label_names
from paca.messages.errors import PacaError

_CALLED = ("label", "labels")
"""Columns that are taken for the label by their name."""


def with_class_labels(dataset: datasets.Dataset, source: str, named: str | None) -> tuple[datasets.Dataset, str]:
    """The dataset with its labels as class labels, and the name of their column.

    Args:
        dataset: Rows with a label each.
        source: What messages call it.
        named: The column, as `data.label` names it. Else it is the only one that has class labels, or is called `label`
            or `labels` and holds names or whole numbers.

    Raises:
        PacaError: There is no such column or there are several, it holds other values, or not every row has one.
    """
    column = _label_column(dataset.features, source, named)
    feature = dataset.features[column]
    values = dataset[column][:] if isinstance(feature, (datasets.Value, datasets.ClassLabel)) else []
    without = [row for row, value in enumerate(values) if _is_none(value, feature)]
    if without:
        raise PacaError(
            f"{len(without):,} of {len(values):,} rows of {source} have no label in the column {column!r}; the first is"
            f" row {without[0]}. Label them or leave them out. (In a .csv, cells such as None and NA count as empty.)"
        )
    if isinstance(feature, datasets.ClassLabel):
        return dataset, column
    if not _can_be_label(feature):
        raise PacaError(
            f"The column {column!r} of {source} holds {_kind(feature)}; expected class labels, names or whole numbers. "
            f"{columns_of(dataset.features)} Correct it, or name another one with data.label."
        )
    texts = [str(value).strip() for value in values]  # a space after a comma of a CSV file is no class
    names = label_names(texts)
    numbers = {name: number for number, name in enumerate(names)}
    found = dataset.remove_columns(column)
    return found.add_column(column, [numbers[text] for text in texts], feature=datasets.ClassLabel(names=names)), column


def _label_column(features: datasets.Features, source: str, named: str | None) -> str:
    if named is not None:
        if named not in features:
            raise PacaError(
                f"{source} has no column {named!r}, which data.label names. {columns_of(features)} Name one of these."
            )
        return named
    called = [name for name in _CALLED if name in features]
    found = [
        name
        for name, feature in features.items()
        if _can_be_label(feature) and (name in called or isinstance(feature, datasets.ClassLabel))
    ]
    if len(found) > 1:
        raise PacaError(
            f"{source} has {len(found)} columns that may be the label: {', '.join(found)}. {columns_of(features)} Name "
            "one of them with data.label."
        )
    if found or called:  # one of another kind is told as such
        return (found or called)[0]
    others = [name for name, feature in features.items() if _can_be_label(feature)]
    advice = (
        f"If {' or '.join(others)} holds the label, name it with data.label." if others else "Add one called label."
    )
    raise PacaError(
        f"{source} says no label with each image: it has no column of class labels, and none called label or labels. "
        f"{columns_of(features)} {advice}"
    )


def _can_be_label(feature: object) -> bool:
    if isinstance(feature, datasets.Value):
        return any(kind in feature.dtype for kind in ("string", "int", "bool"))
    return isinstance(feature, datasets.ClassLabel)


def _is_none(value: object, feature: object) -> bool:
    value = value.strip() if isinstance(value, str) else value
    return value in (None, "") or (value == -1 and isinstance(feature, datasets.ClassLabel))


def columns_of(features: datasets.Features) -> str:
    """The columns that there are, each with its kind, for a message."""
    listed = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    return f"Its columns: {listed or '(none)'}."


def _kind(feature: object) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__

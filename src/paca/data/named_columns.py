"""Columns that have other names than a form of data knows: `data.columns`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from paca.data.rows import Row
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean


def check_names(columns: Mapping[str, str], known: Collection[str]) -> None:
    """Raise `PacaError` for a name that no form knows, among `columns` of a form with the data's own for each."""
    unknown = [name for name in columns if name not in known]
    if not unknown:
        return
    hint = did_you_mean(unknown[0], known) or f" They know {', '.join(sorted(known))}."
    if all(own in known for own in columns.values()):
        swapped = ", ".join(f"{own}: {name}" for name, own in columns.items())
        hint = f" A form's name comes first, then yours: {{{swapped}}}?"
    raise PacaError(f"data.columns names {unknown[0]}, which is a column of no form of data.{hint}")


def renamed(
    rows: Iterable[tuple[str, Row]], columns: Mapping[str, str], optional: Collection[str], source: str
) -> Iterator[tuple[str, Row]]:
    """Give the columns of rows with their places the names that a form knows.

    Args:
        rows: As they are in the data.
        columns: The form's names, with the data's own for each. A row that has the form's own name may lack the other.
        optional: Those of the names that a row may lack; the data as a whole has each.
        source: Names the data in errors.

    Raises:
        PacaError: A column is not there.
    """
    if not columns:
        yield from rows
        return
    unseen, place, row = dict(columns), "", None
    for place, row in rows:
        here = {name: own for name, own in columns.items() if own in row}
        missing = [own for name, own in columns.items() if own not in row and name not in (*row, *optional)]
        if missing:
            _refuse(place, missing, row)
        for name in unseen.keys() & {*here, *row}:
            del unseen[name]
        taken = {*here, *here.values()}
        yield (
            place,
            {**{name: row[own] for name, own in here.items()}, **{k: v for k, v in row.items() if k not in taken}},
        )
    if unseen and row is not None:
        _refuse(source, list(unseen.values()), row)


def _refuse(place: str, missing: list[str], row: Row) -> None:
    raise PacaError(
        f"{place}: there is no column {' and no '.join(missing)}, which data.columns names; found: "
        f"{', '.join(row) or '(nothing)'}.{did_you_mean(missing[0], row)}"
    )

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


def absent(rows: Iterable[tuple[str, Row]], columns: Mapping[str, str]) -> tuple[set[str], dict[str, None]]:
    """The names of a form in `columns` whose own column no row has, and the columns of the rows that were looked at,
    in order; `rows` as they are in the data."""
    unseen, there = dict(columns), dict[str, None]()
    for _, row in rows:
        there |= dict.fromkeys(row)
        unseen = {name: own for name, own in unseen.items() if own not in row}
        if not unseen:
            break
    return set(unseen), there


def refuse_absent(source: str, names: Collection[str], columns: Mapping[str, str], found: Collection[str]) -> None:
    """Raise `PacaError` for `columns` of some names, if there are any, that no record of `source` has.

    Args:
        source: Names the data.
        names: From `absent`.
        columns: The form's names, with the data's own for each.
        found: The columns that it has.
    """
    if not names:
        return
    missing = [own for name, own in columns.items() if name in names]
    there = [name for name in columns if name in names and name in found]
    hint = did_you_mean(missing[0], found) or (
        f" Leave {there[0]} out of data.columns: the data has a column of that name." if there else ""
    )
    raise PacaError(f"{_lacks(source, missing, found)}{hint}")


def renamed(
    rows: Iterable[tuple[str, Row]], columns: Mapping[str, str], optional: Collection[str]
) -> Iterator[tuple[str, Row]]:
    """Give the columns of rows with their places the names that a form knows.

    Args:
        rows: As they are in the data.
        columns: The form's names, with the data's own for each. A row that has the form's own name may lack the other.
        optional: Those of the names that a row may lack.

    Raises:
        PacaError: A column is not there.
    """
    if not columns:
        yield from rows
        return
    for place, row in rows:
        here = {name: own for name, own in columns.items() if own in row}
        missing = [own for name, own in columns.items() if own not in row and name not in (*row, *optional)]
        if missing:
            raise PacaError(f"{_lacks(place, missing, row)}{did_you_mean(missing[0], row)}")
        taken = {*here, *here.values()}
        yield (
            place,
            {**{name: row[own] for name, own in here.items()}, **{k: v for k, v in row.items() if k not in taken}},
        )


def _lacks(place: str, missing: list[str], found: Collection[str]) -> str:
    return (
        f"{place}: there is no column {' and no '.join(missing)}, which data.columns names; found: "
        f"{', '.join(found) or '(nothing)'}."
    )

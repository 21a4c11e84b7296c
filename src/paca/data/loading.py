"""Load training examples from files or the hub."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from paca.data import named_columns, sources
from paca.data.conversion import FAMILIES, ORIGIN, converted
from paca.data.examples import Examples
from paca.data.formats import Format
from paca.data.recognition import describe, for_another_trainer, recognise, told_of_columns
from paca.data.rows import Row
from paca.data.several import joined
from paca.data.sources import Source
from paca.messages.errors import PacaError

_TOLD = 3
"""Of the records that are left out."""

_LOOKED_AT = 1000
"""Records among which one that has the columns of a form is looked for, where others may be left out."""


def load_examples(
    source: str | Sequence[str],
    *,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    family: str = "text",
    leave_out: bool = False,
    columns: Mapping[str, str] | None = None,
    own_names_suffice: bool = False,
) -> Examples:
    """Load examples and bring them into the shape that a trainer takes.

    Args:
        source: A `.jsonl`, `.json` (an array of objects; both also `.gz`), `.csv`, `.tsv` or `.parquet` file, a folder
            of such files (read in the order of their names) or of what `save_to_disk` of datasets left, or a dataset
            on the hub: `owner/name`, with a configuration `owner/name:config`, and with any split that datasets
            understands `owner/name[train[:1000]]`. Or several of these, whose forms may differ; what is given for
            `format`, `split`, `limit` and `columns` holds for each.
        format: `"messages"`, `"prompt-completion"`, `"alpaca"`, `"sharegpt"`, `"question-answer"`,
            `"mmlu"`, `"arc"`, `"oasst-messages"`, `"oasst-trees"` or `"text"`. Recognised from the columns
            when absent. Alpaca and question-answer rows become a `user` and an `assistant` message; those of mmlu
            and arc as well, the options listed below the question and the right one's label as the answer. Of a tree of
            messages the best-ranked conversation is taken. Texts given as prompt and completion stay as they are.
        split: The split of a hub dataset whose `source` names none, of one that was saved with splits, and of a folder
            whose files are named by splits.
        limit: Use only so many examples, from the start.
        family: What they are to be: `"text"` for SFT, `"preferences"`, `"prompts"` or `"labels"`, each with
            forms of its own.
        leave_out: Leave out records from which nothing can be learned, such as those with an empty answer or without
            one.
        columns: Names that a form knows, each with the data's own column for it, such as `{"question": "input"}`. A
            record that has the form's own name may lack the other; some record of some source has it.
        own_names_suffice: All records may, as those of held-out data beside training data that has the others.

    Raises:
        PacaError: The source does not exist, is empty or cannot be parsed, its form is unknown or ambiguous, or an
            example has a field of the wrong type or an empty answer; the text names the file and the line. Or of
            several sources some hold texts, and others messages.
        LacksColumns: It lacks columns of `format`.
    """
    if limit is not None and limit < 1:
        raise PacaError(f"The limit of examples is {limit}; expected at least 1.")
    if family not in FAMILIES:
        raise PacaError(f"There is no family {family!r} of examples; expected one of {', '.join(FAMILIES)}.")
    given: dict[str, str] = dict(columns or {})
    named_columns.check_names(given, {name for form in FAMILIES[family].values() for name in form.columns})
    names: Sequence[Any] = source if isinstance(source, list | tuple) else [source]
    if not names:
        raise PacaError("The list of data sources is empty. Name at least one: a file, a folder or a hub id.")
    forms = FAMILIES[family]
    optional = frozenset(name for name in given if leave_out or any(name in form.optional for form in forms.values()))
    plain = [sources.find_source(name, split) for name in names]
    found = [replace(one, columns=tuple(given.items()), optional=optional) for one in plain]
    firsts = [_first_row(one, format, forms if leave_out else None) for one in found]
    lacking, columns_of = zip(*(named_columns.absent(one.rows(), given) for one in plain), strict=True)
    if not own_names_suffice:
        there = dict.fromkeys(name for columns in columns_of for name in columns)
        named_columns.refuse_absent(", ".join(names), set.intersection(*lacking), given, there)
    return joined(
        [
            _load(source, list(first), format, split, limit, family, leave_out, _without(given, names))
            for source, first, names in zip(found, firsts, lacking, strict=True)
        ]
    )


def _first_row(source: Source, format: str | None, forms: Mapping[str, Format] | None) -> Row:
    """The first record; where some may be left out, with `forms`, of the first ones one that has the columns of the
    `format`, or of any form, if there is one."""
    first = next(source.rows(), None)
    if first is None:
        raise PacaError(f"{source.name} holds no examples: it is empty.")
    for _, row in itertools.islice(source.rows(), 0 if forms is None else _LOOKED_AT):
        with suppress(PacaError):
            recognise(list(row), format, source.name, forms)
            return row
    return first[1]


def _without(given: Mapping[str, str], names: set[str]) -> dict[str, str]:
    return {name: own for name, own in given.items() if name not in names}


def _load(
    found: Source,
    there: list[str],
    format: str | None,
    split: str,
    limit: int | None,
    family: str,
    leave_out: bool,
    given: dict[str, str],
) -> Examples:
    """One source, whose first record has the columns `there`, by a form's names; the others are those of
    `load_examples`, `given` the columns that it has."""
    forms, source = FAMILIES[family], found.name
    own = {name: column for name, column in given.items() if name in there}
    try:
        form = recognise(there, format, source, forms, own)
    except PacaError as error:
        if format is not None:
            raise
        others = {name: forms for name, forms in FAMILIES.items() if name != family}
        other = for_another_trainer(there, others)
        raise PacaError(error if other is None else f"{told_of_columns(there, source, own)} {other}") from None
    dataset = converted(found, form, family, limit, leave_out, there)
    usable, note = dataset, ""
    if leave_out:
        first = dataset.select_columns(dataset.column_names[0]).with_format("arrow")[:]
        usable = dataset.select(np.flatnonzero(first.column(0).is_valid()))
    if count := len(dataset) - len(usable):
        rows = np.flatnonzero(first.column(0).is_null())[:_TOLD]
        places = "; ".join([*dataset.select(rows)[ORIGIN][:], *["..."] * (count > _TOLD)])
        note = f"; {count:,} left out, as nothing can be learned from them ({places})"
    if found.left_out:
        of_all = len(found.files) + found.left_out
        note += f"; of {len(found.files)} of the folder's {of_all} files, by their names those of the split {split!r}"
    return Examples(usable, form.name, source, describe(form, there, usable, given) + note)

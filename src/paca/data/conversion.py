"""Rows of a source become the examples of a form, as a table that is kept on disk."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import xxhash
from datasets import Dataset, Features, Json, List, Value

from paca.data import (
    choices,
    formats,
    labelled_texts,
    message_trees,
    named_columns,
    preferences,
    prompts,
    rows,
    sources,
)
from paca.data.choices import OPTIONS
from paca.data.formats import Example, Format
from paca.data.recognition import recognise
from paca.data.sources import Source
from paca.messages.errors import NothingToLearn, PacaError, first_line
from paca.messages.nearest import did_you_mean
from paca.pretrained.quiet import without_progress_bars
from paca.pretrained.whole_output import write_whole

ORIGIN = "origin"
"""The column that says where an example comes from. TRL carries it along (except when packing) and ignores it."""

RENDERED = ("messages", "prompt", "completion", "chosen", "rejected", "text")
"""The columns that are text, or messages that a chat template renders."""

FAMILIES = {
    "text": formats.FORMATS,
    "preferences": preferences.PREFERENCES,
    "prompts": prompts.PROMPTS,
    "labels": labelled_texts.LABELLED_TEXTS,
}
"""The forms that each kind of trainer learns from."""


_LOOKED_AT = 10_000
"""Records after one from which nothing can be learned, among which others are counted."""


class _MoreColumns(PacaError):
    """An example has columns that the first one lacks."""


class _Refused(PacaError):
    """The record of a place is wrong, or nothing can be learned from it and none is left out."""

    def __init__(self, place: str, reason: str, unusable: bool) -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.unusable = place, unusable
        self.kind = "unusable" if unusable else re.sub(r"\d+", "", reason)
        """What is the same for others like it: which message of a conversation it is, is not."""


def converted(
    found: Source, form: Format, family: str, limit: int | None, leave_out: bool, there: list[str]
) -> Dataset:
    """The examples, as `paca.data.load_examples` describes them; what can't be used as a row of nulls.

    Args:
        there: The columns of the first record. Gets those that are found in later ones.

    Raises:
        PacaError: As `load_examples`.
    """
    try:
        return _converted(found, form, family, limit, leave_out, there)
    except _Refused as error:
        more = _others(found, form, error, limit)
        if error.unusable:
            instead = "Or leave such records out with data.unusable: leave_out (in Python leave_out=True)"
            raise PacaError(f"{error} {instead}{more and ': '}{more}.") from None
        raise PacaError(f"{error}{more and ' '}{more[:1].upper()}{more[1:]}{more and '.'}") from None


def _others(found: Source, form: Format, first: _Refused, limit: int | None) -> str:
    """How many of the records after the first one that is refused are refused for the same; empty if none is."""
    count, seen, ended = 0, 0, ""
    rows = itertools.dropwhile(lambda one: one[0] != first.place, itertools.islice(_rows(found, form), limit))
    try:
        for one in itertools.islice(rows, 1, 1 + _LOOKED_AT):
            seen += 1
            try:
                _convert(found, form, *one, leave_out=False)
            except _Refused as other:
                count += other.kind == first.kind
    except PacaError as error:
        ended = f", up to one that can't be read: {first_line(error).removesuffix('.')}"
    if not count and not ended:
        return ""
    alone = count == seen == 1
    which = "the next record" if alone else f"{count:,} more of the {seen:,} records after it"
    are, have = ("is", "has") if count == 1 else ("are", "have")
    return f"{which} {f'{are} such' if first.unusable else f'{have} the same error'}{' too' if alone else ''}{ended}"


def _converted(
    found: Source, form: Format, family: str, limit: int | None, leave_out: bool, there: list[str]
) -> Dataset:
    """As `converted`; arguments and errors as there."""
    example = next(filter(None, (_convert(found, form, *one, leave_out) for one in _rows(found, form))), None)
    if example is None:
        raise PacaError(f"{found.name} holds no example of the form {form.name}: nobody answers in it.")
    wider = Path(datasets.config.HF_DATASETS_CACHE, f"paca-{_fingerprint(found, form, limit, leave_out)}.json")
    if not wider.is_file():
        try:
            return _table(found, form, family, _features(example, family), limit, leave_out)
        except _MoreColumns:
            _note_columns(wider, found, form, limit, leave_out)
    columns, rows_have = json.loads(wider.read_text(encoding="utf-8"))
    there += [name for name in rows_have if name not in there]
    return _table(found, form, family, _features(dict.fromkeys(columns) | example, family), limit, leave_out)


def _note_columns(file: Path, found: Source, form: Format, limit: int | None, leave_out: bool) -> None:
    """Look for the columns of all examples, and of all rows, and keep them for the next time."""
    columns: dict[str, None] = {}
    rows_have: dict[str, None] = {}
    for place, row in itertools.islice(_rows(found, form), limit):
        rows_have |= dict.fromkeys(row)
        if all(column in row for column in form.required):
            columns |= dict.fromkeys(_convert(found, form, place, row, leave_out) or ())
    write_whole(file, json.dumps([list(columns), list(rows_have)]))


def _table(found: Source, form: Format, family: str, features: Features, limit: int | None, leave_out: bool) -> Dataset:
    options = {
        "source": found,
        "family": family,
        "format_name": form.name,
        "limit": limit,
        "leave_out": leave_out,
        "columns": tuple(features),  # a list would be taken for sources, to be read by several processes
        "rendered": tuple(name for name in RENDERED if not isinstance(features.get(name), Json)),
        "as_json": tuple(name for name, feature in features.items() if isinstance(feature, Json)),
    }
    fingerprint = _fingerprint(found, form, limit, leave_out, tuple(features))
    with without_progress_bars(datasets):
        try:
            return Dataset.from_generator(_examples, features=features, gen_kwargs=options, fingerprint=fingerprint)
        except datasets.exceptions.DatasetGenerationError as error:
            cause = _paca_error_behind(error)
            if cause is None:
                raise
            raise cause from None


def _examples(
    source: Source,
    family: str,
    format_name: str,
    limit: int | None,
    leave_out: bool,
    columns: tuple[str, ...],
    rendered: tuple[str, ...],
    as_json: tuple[str, ...],
) -> Iterator[Example]:
    form = FAMILIES[family][format_name]
    first: Example | None = None
    for place, row in itertools.islice(_rows(source, form), limit):
        if first is not None and any(column not in row for column in form.required):
            _refuse_other_form(form, family, first[ORIGIN], place, row)
        example = _convert(source, form, place, row, leave_out)
        if example is None:
            yield {**dict.fromkeys(columns), ORIGIN: place}
            continue
        if first is not None and any(type(example.get(name)) is not type(first.get(name)) for name in rendered):
            raise PacaError(
                f"{place}: text and lists of messages are mixed; {first[ORIGIN]} is of the other kind. Give all "
                "examples in one form."
            )
        if not example.keys() <= set(columns):
            raise _MoreColumns(place)
        first = first or example
        # A text that is JSON would be taken for what it says: "007" for 7.
        texts = {name: json.dumps(example[name]) for name in as_json if isinstance(example.get(name), str)}
        yield {name: example.get(name) for name in columns} | texts


def _refuse_other_form(form: Format, family: str, first: str, place: str, row: rows.Row) -> None:
    """Say so where a row is whole in another form than the first one; else it only lacks a column."""
    try:
        other = recognise(list(row), None, place, FAMILIES[family])
    except PacaError:
        return
    missing = " and no ".join(column for column in form.required if column not in row)
    raise PacaError(
        f"{place} is of the form {other.name}: it has {' and '.join(other.required)}, but no {missing}. The records "
        f"from {first} on are of the form {form.name}. Bring all records into one form, or take the others out."
    )


def _rows(source: Source, form: Format) -> Iterator[tuple[str, rows.Row]]:
    return source.rows() if form.gather is None else form.gather(source.rows())


def _convert(source: Source, form: Format, place: str, row: rows.Row, leave_out: bool) -> Example | None:
    missing = [column for column in form.required if column not in row]
    try:
        if missing:
            hint = did_you_mean(missing[0], [column for column in row if column not in form.required])
            raise NothingToLearn(
                f"there is no column {' and no '.join(missing)}; found: {', '.join(row) or '(nothing)'}.{hint} "
                "Complete the record."
            )
        return {**form.convert(row), ORIGIN: place}
    except NothingToLearn as error:
        if leave_out:
            return None
        raise _Refused(place, _in_own_words(error, source), unusable=True) from None
    except PacaError as error:
        raise _Refused(place, _in_own_words(error, source), unusable=False) from None


def _in_own_words(error: PacaError, source: Source) -> str:
    """What is wrong with a column, by the name that it has there where `data.columns` gave it the form's."""
    name = re.match(r"\w*", str(error))[0]  # type: ignore[index]  # it matches everything
    return dict(source.columns).get(name, name) + str(error)[len(name) :]


def _features(example: Example, family: str) -> Features:
    # Messages are kept as JSON: as a struct, each would get every field of every other one, null where it has none.
    def feature(name: str, value: object) -> List | Value | Json:
        if name == OPTIONS:
            return List(Value("string"))
        if family == "prompts" and name not in ("prompt", ORIGIN):
            return Json()  # for reward functions, of whatever type
        return List(Json()) if isinstance(value, list) else Value("string")

    return Features({name: feature(name, value) for name, value in example.items()})


def _fingerprint(
    source: Source, form: Format, limit: int | None, leave_out: bool, columns: tuple[str, ...] = ()
) -> str:
    """Names the cached conversion: another content, another choice or another version of this code, another name."""
    content = xxhash.xxh128()
    content.update(
        f"{source.fingerprint()}|{source.name}|{source.columns}|{sorted(source.optional)}|{form.name}|{limit}|{leave_out}|{columns}".encode()
    )
    for module in (choices, formats, labelled_texts, message_trees, named_columns, preferences, prompts, rows, sources):
        content.update(Path(str(module.__file__)).read_bytes())
    content.update(Path(__file__).read_bytes())
    return content.hexdigest()


def _paca_error_behind(error: BaseException | None) -> PacaError | None:
    while error is not None and not isinstance(error, PacaError):
        error = error.__cause__ or error.__context__
    return error

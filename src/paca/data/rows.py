"""Read the rows of a data file, one at a time and with their place in it."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features

from paca.data.file_names import SUFFIXES, suffix_of
from paca.messages.errors import PacaError

Row = dict[str, Any]

# A single answer may be longer than the 128 KiB that the csv module allows for a field.
_CSV_FIELD_LIMIT = 2**31 - 1

_LINE_BREAK = re.compile(r"\r\n?|\n")


def rows_of(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield `(place, row)`; the place names file and line, as in `"train.jsonl, line 7"`.

    Raises:
        PacaError: The file cannot be parsed.
    """
    reader = _READERS.get(suffix_of(file))
    if reader is None:
        raise PacaError(f"{file} is no data file by its name. Understood are {', '.join(SUFFIXES)}.")
    try:
        yield from reader(file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise PacaError(f"{file} is not a whole gzip file: {error}. Fetch or pack it anew.") from error


def _open(file: Path) -> TextIO:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _text_of(file: Path) -> str:
    try:
        with _open(file) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise _not_utf_8(file, f" (byte {error.start})") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with _open(file) as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file.name}, line {number}", _json_object(line, f"{file}, line {number}")
        except UnicodeDecodeError as error:
            raise _not_utf_8(file, f" (after line {number})" if number else "") from error


def _not_utf_8(file: Path, where: str) -> PacaError:
    with file.open("rb") as stream:
        found = "UTF-16" if stream.read(2) in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text" + where
    return PacaError(f"{file} is {found}. Save it as UTF-8, as a spreadsheet does under CSV UTF-8.")


def _array(line: str) -> str:
    return " One array of them goes into a .json file." if line.lstrip().startswith("[") else ""


def _json_object(text: str, place: str) -> Row:
    try:
        row = json.loads(text.rstrip("\r\n"))  # with its end, a text that was cut off has a "control character"
    except json.JSONDecodeError as error:
        told = f"{error.msg.removesuffix(' at')} (column {error.pos + 1})"
        raise PacaError(f"{place} is not valid JSON: {told}. Expected one JSON object a line.{_array(text)}") from error
    except (ValueError, RecursionError) as error:
        raise PacaError(f"{place} can't be read as JSON: {error}.") from error
    if not isinstance(row, dict):
        raise PacaError(f"{place} holds {_kind(row)}; expected a JSON object with named fields.{_wrapped(row)}")
    if "\\ud" in text.lower():
        _check_characters(row, place)
    return row


def _wrapped(value: object) -> str:
    """What to do with a line that is a list: of messages, or of all records."""
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    name = "messages" if "role" in first else "conversations" if "from" in first else None
    if name:
        return f' Wrap each list of messages in one: {{"{name}": [...]}}.'
    return " An array of records is read from a file that ends in .json." if first else ""


def _check_characters(row: Row, place: str) -> None:
    """Refuse halves of characters: JSON can escape them, and no text can hold them."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise PacaError(
            f"{place} holds {half}, one half of a character that JSON writes as two escapes. Correct the text, or take "
            "the record out."
        ) from None


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """A JSON array of objects, decoded one element at a time; or JSON lines under the wrong suffix."""
    text = _text_of(file)
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        _refuse_object(file, text)
        yield from _jsonl_rows(file)
        return
    decoder = json.JSONDecoder()
    position = _skip_space(text, position + 1)
    index, has_halves = 0, "\\ud" in text.lower()
    while text[position : position + 1] != "]":
        try:
            row, position = decoder.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except json.JSONDecodeError as error:
            raise PacaError(
                f"{file}, line {error.lineno} is not valid JSON: {error.msg} (column {error.colno}, in record {index})."
            ) from error
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
            raise PacaError(f"{file}, record {index} can't be read as JSON: {error}.") from error
        if not isinstance(row, dict):
            told = f"is {_kind(row)}; expected a JSON object with named fields.{_wrapped(row)}"
            raise PacaError(f"{file}, record {index} {told}")
        if has_halves:
            _check_characters(row, f"{file}, record {index}")
        yield f"{file.name}, record {index}", row
        index += 1


_RECORDS_BY_NAME = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{[^{}]*\}\s*,\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')
_RECORDS_WITHIN = re.compile(r'\s*\{\s*"(data|records|examples|rows|items|train)"\s*:\s*\[\s*\{')


def _refuse_object(file: Path, text: str) -> None:
    """Refuse a file that is one object, such as `{"data": [...]}`, over many lines or with records in such a list."""
    in_one_line = "\n" not in text.strip()
    within_one = _RECORDS_WITHIN.match(text)
    if in_one_line and not within_one and not _RECORDS_BY_NAME.match(text):
        return
    if not in_one_line and text.partition("\n")[0].rstrip().endswith("}"):  # it is lines
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return
    fields = content if isinstance(content, dict) else {}
    by_name = len(fields) > 5 and all(isinstance(value, dict) for value in fields.values())
    if in_one_line and not within_one and not by_name:  # one record, whose fields are objects
        return
    within = [name for name, value in fields.items() if isinstance(value, list)]
    hint = f" Write the list {within[0]!r} in it to a file of its own." if within else ""
    if by_name:
        hint = f" Write its values, of which the first is {next(iter(fields))!r}, as an array."
    raise PacaError(f"{file} holds {_kind(content)}; expected an array of objects, or an object a line.{hint}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        read = 0
        try:
            separator = "\t" if suffix_of(file) == ".tsv" else _separator(stream.readline())
            stream.seek(0)
            names = _names_of_mmlu(next(csv.reader(stream, delimiter=separator), []))
            stream.seek(0)
            reader = csv.DictReader(stream, names, strict=True, delimiter=separator)
            columns = list(reader.fieldnames or ())
            read = reader.line_num
            if repeated := next((name for name in columns if name and columns.count(name) > 1), None):
                raise PacaError(f"{file} has two columns named {repeated!r}. Give one of them another name.")
            for row in reader:
                read = reader.line_num
                within = sum(len(_LINE_BREAK.findall(value)) for value in row.values() if isinstance(value, str))
                place = f"{file.name}, line {read - within}"
                if None in row or None in row.values():
                    hold = "commas" if separator == "," else repr(separator)
                    raise PacaError(
                        f"{place} has {'more' if None in row else 'fewer'} fields than the header ({len(columns)}: "
                        f"{', '.join(columns)}). Quote fields that hold {hold} or line breaks."
                    )
                yield place, row
        except csv.Error as error:
            raise PacaError(f"{file} is not valid CSV after line {read}: {error}.") from error
        except UnicodeDecodeError as error:
            raise _not_utf_8(file, f" (after line {read})" if read else "") from error


def _separator(header: str) -> str:
    """A comma, or what spreadsheets take where that is the decimal point, or a tab."""
    return next((one for one in "\t;" if one in header and "," not in header), ",")


def _names_of_mmlu(first: list[str]) -> list[str] | None:
    """The names of the columns of MMLU's own files, which have no header: a question, its options, a letter."""
    names = ["question", "A", "B", "C", "D", "answer"]
    headless = len(first) == len(names) and first[-1].strip() in names[1:-1]
    return None if not headless or {"question", "answer", "label"} & {cell.strip().lower() for cell in first} else names


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            features, index = _features_of(table.schema_arrow), 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{file.name}, row {index}", without_null_fields(with_label_names(row, features))
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise PacaError(f"{file} is not a readable Parquet file: {str(error).strip()}") from error


def _features_of(schema: pyarrow.Schema) -> Mapping[str, Any]:
    """What datasets wrote of the columns' types beside a file's schema, if it did."""
    try:
        return Features.from_arrow_schema(schema)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        NotImplementedError,
    ):  # a type that it does not know, or other metadata
        return {}


def with_label_names(row: Row, features: Mapping[str, Any]) -> Row:
    """A row with the names of its class labels in place of their numbers, and null for -1, which stands for none."""
    labels = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel) and name in row}
    return {
        **row,
        **{name: None if row[name] in (None, -1) else label.int2str(row[name]) for name, label in labels.items()},
    }


def without_null_fields(row: Row) -> Row:
    """A row of Arrow's without what it makes up: there all objects of a column have the fields of each, null for most.

    So the arguments of one tool would stand in the calls of all others. Only messages and tools are such objects here;
    a null elsewhere may mean something to a reward function.
    """
    return {name: _without_null_fields(value) if _has_fields_of_others(value) else value for name, value in row.items()}


def _has_fields_of_others(value: Any) -> bool:
    objects = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else ()
    return any(not {"role", "from", "function", "parameters"}.isdisjoint(one) for one in objects)


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null_fields(field) for name, field in value.items() if field is not None}
    return [_without_null_fields(one) for one in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


_READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json.gz": _json_rows,
}

"""Reading data files: what each type yields, and what each kind of damage says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from paca.data.rows import rows_of
from paca.messages.errors import PacaError

ROWS = [{"text": "one, two"}, {"text": 'quoted "three"\nfour'}, {"text": "пять 漢字"}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(write_rows(folder, suffix.removesuffix(".gz")).read_bytes()))
        return path
    if suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in ROWS))
    if suffix == ".json":
        return write(path, json.dumps(ROWS, indent=2, ensure_ascii=False))
    if suffix == ".csv":
        return write(path, "text\n" + "".join('"' + row["text"].replace('"', '""') + '"\n' for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz"])
def test_every_file_type_yields_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert [row for _, row in rows_of(write_rows(tmp_path, suffix))] == ROWS


def test_places_are_those_an_editor_shows(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", '{"text": "x"}\n\n{"text": "y"}')
    assert [place for place, _ in rows_of(jsonl)] == ["a.jsonl, line 1", "a.jsonl, line 3"]
    assert [place for place, _ in rows_of(write_rows(tmp_path, ".csv"))] == [
        "rows.csv, line 2",
        "rows.csv, line 3",  # the field spans lines 3 and 4
        "rows.csv, line 5",
    ]
    assert [place for place, _ in rows_of(write_rows(tmp_path, ".json"))][-1] == "rows.json, record 2"


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    assert [row for _, row in rows_of(write(tmp_path / "a.csv", "\ufefftext\nx\n"))] == [{"text": "x"}]
    assert [row for _, row in rows_of(write(tmp_path / "a.jsonl", '\ufeff{"text": "x"}'))] == [{"text": "x"}]


def test_json_lines_under_the_suffix_of_json_are_read(tmp_path: Path) -> None:
    assert len(list(rows_of(write(tmp_path / "a.json", '{"text": "x"}\n{"text": "y"}\n')))) == 2


def test_a_csv_field_may_be_long(tmp_path: Path) -> None:
    ((_, row),) = rows_of(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n"))
    assert len(row["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            '{"text": "\\ud83d\\ude00"}\n{"text": "\\ud800"}\n',
            ["a.jsonl, line 2", r"holds \ud800, one half"],
        ),
        ("a.json", '[{"text": "\\ud83d\\ude00"}, {"\\uD800": 1}]', ["a.json, record 1", r"holds \ud800, one half"]),
        (
            "a.jsonl",
            '[{"text": "x"}, {"text": "y"}]\n',
            ["line 1 holds a list", "read from a file that ends in .json."],
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.json", '{\n"n": 1,\n"data": [{"text": "x"}]\n}', ["an object; expected an array", "the list 'data' in it"]),
        (
            "a.json",
            '{"data": [{"text": "x"}, {"text": "y"}]}',
            ["an object; expected an array", "the list 'data' in it"],
        ),
        ("a.csv", ",,question,answer,answer\n,,a,b,c\n", ["a.csv has two columns named 'answer'", "another name"]),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', ["a.jsonl, line 2", "a list", "JSON object"]),
        ("a.json", '[{"text": "x"},\n {"text": "y"},\n {"text" "z"}]', ["a.json, line 3", "record 2"]),
        ("a.json", '[{"text": "x"}\n {"text": "y"}]', ["a.json, line 2", "','"]),
        ("a.json", '[{"text": "x"}', ["a.json", "','"]),
        ("a.json", '[{"text": "x"}, 5]', ["record 1", "a number"]),
        (
            "a.jsonl",
            '[{"role": "user", "content": "x"}]\n',
            ["a list", 'Wrap each list of messages in one: {"messages": ['],
        ),
        (
            "a.json",
            '[[{"from": "human", "value": "x"}]]',
            ["record 0", 'of messages in one: {"conversations": [...]}.'],
        ),
        ("a.jsonl", '{"n": 1}\n{"n": ' + "[" * 20_000, ["a.jsonl, line 2", "recursion"]),
        ("a.jsonl", '{"n": ' + "9" * 5_000 + "}", ["a.jsonl, line 1", "5000 digits"]),
        ("a.json", '[{"n": 1}, {"n": ' + "[" * 20_000, ["a.json, record 1", "recursion"]),
        ("a.json", '[{"n": ' + "9" * 5_000 + "}]", ["a.json, record 0", "5000 digits"]),
        ("a.csv", 'prompt,completion\na,b\n"c,d\n', ["a.csv is not valid CSV after line 2"]),
        ("a.csv", "prompt,completion\na,b\nc\n", ["a.csv, line 3", "fewer", "prompt, completion"]),
        ("a.csv", "prompt,completion\na,b,c\n", ["a.csv, line 2", "more", "Quote"]),
        ("a.parquet", "PAR1 is not enough", ["a.parquet", "Parquet"]),
    ],
)
def test_a_damaged_file_is_one_error_that_names_the_place(
    tmp_path: Path, name: str, content: str, expected: list[str]
) -> None:
    with pytest.raises(PacaError) as error:
        list(rows_of(write(tmp_path / name, content)))
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.TSV", "\t")])
def test_separators_of_spreadsheets_are_known_by_the_header(tmp_path: Path, name: str, separator: str) -> None:
    file = write(tmp_path / name, f'question{separator}answer\n"1{separator}5, or\n2?"{separator}"a;b"\n')
    [(place, row)] = rows_of(file)
    assert (place, row) == (f"{name}, line 2", {"question": f"1{separator}5, or\n2?", "answer": "a;b"})


def test_text_that_is_not_utf_8_from_its_first_line_on_names_no_line(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes('{"frage": "für"}'.encode("latin-1"))
        with pytest.raises(PacaError, match=rf"{name} is not UTF-8 text\. Save"):
            list(rows_of(tmp_path / name))


def test_text_in_utf_16_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question,answer\n1,2\n".encode("utf-16"))
    with pytest.raises(PacaError, match=r"a\.csv is UTF-16\. Save it as UTF-8, as .* CSV UTF-8"):
        list(rows_of(tmp_path / "a.csv"))


@pytest.mark.parametrize("damage", ["cut", "other bytes", "not packed"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = write_rows(tmp_path, suffix)
    packed = path.read_bytes()
    if damage == "other bytes":
        path.write_bytes(packed[:12] + b"\xff" * 12 + packed[24:])
    else:
        path.write_bytes(packed[:-12] if damage == "cut" else b'{"text": "x"}')
    with pytest.raises(PacaError, match=rf"rows{suffix} is not a whole gzip file: .*\. Fetch or pack it anew\."):
        list(rows_of(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_in_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("text\nÄpfel und Birnen\n".encode("latin-1"))
    with pytest.raises(PacaError, match="UTF-8"):
        list(rows_of(path))


def test_a_file_of_another_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("{}")
    with pytest.raises(PacaError, match=r"questions\.txt is no data file by its name\. Understood are \.jsonl"):
        list(rows_of(tmp_path / "questions.txt"))


def test_fields_that_only_other_rows_of_a_parquet_file_have_are_not_there(tmp_path: Path) -> None:
    with_null = {"value": 4, "unit": None}
    calls = [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "mail", "arguments": {"to": "Bob", "cc": None}},
    ]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [call]}], "note": with_null} for call in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    del calls[1]["arguments"]["cc"]  # type: ignore[attr-defined]
    assert [row for _, row in rows_of(path)] == rows

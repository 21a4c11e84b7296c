"""Records from which nothing can be learned are refused with what to do, or left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

from paca.data import load_examples
from paca.messages.errors import PacaError

FINE = {"question": "a?", "answer": "b"}
ARC = {"question": "a?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}
PAIR = {"prompt": "a?", "chosen": "b", "rejected": "c"}


def turns(answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", **answer}]}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("fine", "record", "family"),
    [
        (FINE, {"question": "c?", "answer": ""}, "text"),
        (FINE, {"question": "c?", "answer": None}, "text"),
        (FINE, {"question": None, "answer": "d"}, "text"),
        (FINE, {"question": "c?"}, "text"),
        (FINE, {"id": 3}, "text"),
        ({"text": "a"}, {"text": None}, "text"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, "text"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, "text"),
        (turns({"content": "b"}), turns({"content": None}), "text"),
        (turns({"content": "b"}), turns({}), "text"),
        (turns({"content": "b"}), {"messages": None}, "text"),
        (turns({"content": "b"}), {"messages": []}, "text"),
        (
            {"conversations": [{"from": "gpt", "value": "b"}]},
            {"conversations": [{"from": "gpt", "value": None}]},
            "text",
        ),
        ({**FINE, "choices": ["x", "y"], "answer": 0}, {**FINE, "choices": ["x", "y"], "answer": None}, "text"),
        ({**FINE, "choices": ["x", "y"], "answer": 0}, {**FINE, "choices": ["x", "y"], "answer": ""}, "text"),
        (ARC, {**ARC, "answerKey": ""}, "text"),
        (PAIR, {**PAIR, "rejected": None}, "preferences"),
        (PAIR, {"prompt": "a?", "chosen": "b"}, "preferences"),
        ({"text": "a", "label": "x"}, {"text": "b", "label": None}, "labels"),
        ({"text": "a", "label": "x"}, {"text": None, "label": "x"}, "labels"),
        ({"question": "a?"}, {"question": None}, "prompts"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_record_without_what_is_learned_is_left_out_or_told_how(
    tmp_path: Path, fine: dict[str, Any], record: dict[str, Any], family: str, first: bool
) -> None:
    source = write(tmp_path / "data.jsonl", [record, fine, fine] if first else [fine, fine, record])
    found = load_examples(source, family=family, leave_out=True)
    assert len(found.dataset) == 2
    assert (
        f"; 1 left out, as nothing can be learned from them (data.jsonl, line {1 if first else 3})" in found.description
    )
    if first and not fine.keys() <= record.keys():
        return  # its form is not recognised without the others
    told = rf"line {1 if first else 3}: .*data\.unusable: leave_out \(in Python leave_out=True\)\.$"
    with pytest.raises(PacaError, match=told):
        load_examples(source, family=family)


def test_how_many_more_there_are_is_told(tmp_path: Path) -> None:
    bad = [{"question": "c?", "answer": None}, {"question": "c?"}, {"question": "c?", "answer": 5}]
    source = write(tmp_path / "data.jsonl", [FINE, bad[0], FINE, bad[1], bad[0], bad[2]])
    with pytest.raises(PacaError, match=r"line 2: answer is missing; .*: 2 more of the 4 records after it are such\.$"):
        load_examples(source)
    with pytest.raises(PacaError, match=r"line 2: .*: 1 more of the 2 records after it is such\.$"):
        load_examples(source, limit=4)
    source = write(tmp_path / "two.jsonl", bad[:2])
    with pytest.raises(PacaError, match=r"line 1: .*: the next record is such too\.$"):
        load_examples(source)


def test_how_many_more_have_the_same_error_is_told(tmp_path: Path) -> None:
    fine, other = turns({"content": "b"}), turns({"content": 5})
    bot = {"messages": [*fine["messages"], {"role": "bot", "content": "c"}]}
    later = {"messages": [*fine["messages"], *bot["messages"]]}
    source = write(tmp_path / "data.jsonl", [fine, bot, fine, later, other, bot])
    told = r"line 2: messages\[2\] has the role 'bot'; .* tool\. Rename it in the data, or take such records out\. "
    for leave_out in (False, True):  # something may be learned from them
        with pytest.raises(PacaError, match=told + r"2 more of the 4 records after it have the same error\.$"):
            load_examples(source, leave_out=leave_out)
    with pytest.raises(PacaError, match=told.strip() + "$"):
        load_examples(source, limit=3)
    speaker = {"conversations": [{"from": "bot", "value": "a"}]}
    with pytest.raises(PacaError, match=r"from 'bot'; .*\. Rename it .* The next record has the same error too\.$"):
        load_examples(write(tmp_path / "two.jsonl", [speaker, speaker]))
    with pytest.raises(PacaError, match=r"is from \['human'\]; known are: "):
        load_examples(write(tmp_path / "list.jsonl", [{"conversations": [{"from": ["human"], "value": "a"}]}]))


def test_a_count_that_ends_at_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    bad, file = {"question": "c?", "answer": ""}, tmp_path / "data.jsonl"
    write(file, [FINE, bad, bad])
    whole = file.read_text()
    file.write_text(whole + '{"question": \n' + whole)
    ended = r", up to one that can't be read: .*data\.jsonl, line 4 is not valid JSON: .*\.$"
    with pytest.raises(PacaError, match=r"line 2: .*: the next record is such too" + ended):
        load_examples(str(file))
    write(file, [FINE, bad, FINE])
    file.write_text(file.read_text() + '{"question": \n' + whole)
    with pytest.raises(PacaError, match=r"line 2: .*: 0 more of the 1 records after it are such" + ended):
        load_examples(str(file))


def test_a_named_column_may_be_absent_from_what_is_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", [{"q": "a?", "a": "b"}, {"q": "c?"}])
    columns = {"question": "q", "answer": "a"}
    assert len(load_examples(source, columns=columns, leave_out=True).dataset) == 1
    with pytest.raises(PacaError, match=r"line 2: there is no column a, which data\.columns names"):
        load_examples(source, columns=columns)


@pytest.mark.parametrize(("value", "told"), [("", "is empty"), (None, "is missing"), (5, "is a number")])
def test_a_named_column_is_told_by_its_own_name(tmp_path: Path, value: Any, told: str) -> None:
    source = write(tmp_path / "data.jsonl", [{"q": "a?", "route": "b"}, {"q": "c?", "route": value}])
    with pytest.raises(PacaError, match=f"line 2: route {told}"):
        load_examples(source, columns={"question": "q", "answer": "route"})


def test_of_many_that_are_left_out_the_first_are_told(tmp_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", [FINE, *[{"question": "c?", "answer": None}] * 4])
    assert (
        "from them (data.jsonl, line 2; data.jsonl, line 3; data.jsonl, line 4; ...)"
        in load_examples(source, leave_out=True).description
    )


def test_records_of_another_form_are_not_left_out(tmp_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", [FINE, turns({"content": "b"})])
    with pytest.raises(PacaError, match="line 2 is of the form messages"):
        load_examples(source, leave_out=True)


def test_numbers_in_a_table_are_refused_with_a_way_that_works_there(tmp_path: Path) -> None:
    table, file = pandas.DataFrame({"question": ["2 + 2?"], "answer": [4]}), tmp_path / "data.parquet"
    table.to_parquet(file)
    with pytest.raises(PacaError, match=r"answer is a number; .*, or make the column of a table text \(in pandas: "):
        load_examples(str(file))
    table.astype(str).to_parquet(file)
    assert load_examples(str(file)).dataset[0]["completion"][0]["content"] == "4"

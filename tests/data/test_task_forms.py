"""Data for other trainers than SFT: pairs, prompts, and texts with labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paca.data import Examples, load_examples
from paca.data.labelled_texts import label_names
from paca.messages.errors import PacaError

USER = {"role": "user", "content": "2+2?"}
RIGHT = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}


def load(tmp_path: Path, family: str, *records: dict[str, Any]) -> Examples:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_examples(str(file), family=family)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": "2+2?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": "2+2?", "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    ],
    ids=["explicit", "implicit", "repeated prompt", "prompt as text", "answers as text", "question", "instruction"],
)
def test_pairs_of_messages_come_out_the_same_whatever_their_form(tmp_path: Path, record: dict[str, Any]) -> None:
    row = load(tmp_path, "preferences", record).dataset[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([USER], [RIGHT], [WRONG])
    assert row["origin"] == "data.jsonl, line 1"


@pytest.mark.parametrize(
    ("record", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Q: ", "chosen": "yes", "rejected": "no"}, "Q: ", "yes", "no"),
        ({"chosen": "Q: a b", "rejected": "Q: a c"}, "Q: a", " b", " c"),
        ({"chosen": "Human: hi\nyes", "rejected": "Human: hi\nno"}, "Human: hi\n", "yes", "no"),
    ],
)
def test_pairs_of_text_are_split_between_words(
    tmp_path: Path, record: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    row = load(tmp_path, "preferences", record).dataset[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, chosen, rejected)


def test_a_system_message_comes_first(tmp_path: Path) -> None:
    record = {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}
    assert load(tmp_path, "preferences", record).dataset[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": ""},
            "line 2: with rejected as the completion: completion is empty",
        ),
        ({"prompt": "a", "chosen": "b"}, "line 2: there is no column rejected; found: prompt, chosen"),
        ({"prompt": 3, "chosen": "4", "rejected": "5"}, "line 2: with chosen as the completion: prompt is"),
    ],
)
def test_the_first_bad_pair_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(PacaError, match=message):
        load(tmp_path, "preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}, record)


def test_pairs_without_a_common_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="line 1: chosen and rejected begin differently, so no prompt is in them"):
        load(tmp_path, "preferences", {"chosen": "yes", "rejected": "no"})


def test_data_of_another_family_says_what_is_understood(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"columns: instruction, output.*\n.*preference: prompt, chosen, rejected"):
        load(tmp_path, "preferences", {"instruction": "a", "output": "b"})


def test_prompts_keep_what_rewards_need_as_it_was(tmp_path: Path) -> None:
    records = [{"question": "2+2?", "answer": 4, "hints": {"n": [1, None]}}, {"question": "3?", "answer": "three"}]
    dataset = load(tmp_path, "prompts", *records).dataset
    assert dataset[0]["prompt"] == [USER]
    assert list(dataset["answer"]) == [4, "three"]
    assert list(dataset["hints"]) == [{"n": [1, None]}, None]


def test_prompts_as_text_or_messages_stay_so(tmp_path: Path) -> None:
    assert load(tmp_path, "prompts", {"prompt": "say"}).dataset[0]["prompt"] == "say"
    assert load(tmp_path, "prompts", {"prompt": [USER]}).dataset[0]["prompt"] == [USER]


@pytest.mark.parametrize(("label", "expected"), [("good", "good"), (3, "3"), (True, "true")])
def test_labels_are_names(tmp_path: Path, label: object, expected: str) -> None:
    assert load(tmp_path, "labels", {"text": "a", "label": label}).dataset[0]["label"] == expected


@pytest.mark.parametrize("label", [None, "", 0.5, ["a"]])
def test_a_record_without_a_label_is_named(tmp_path: Path, label: object) -> None:
    with pytest.raises(PacaError, match=r"data.jsonl, line 2: label is .*; expected a name or a whole number"):
        load(tmp_path, "labels", {"text": "a", "label": "x"}, {"text": "b", "label": label})


def test_numbers_count_by_value_and_come_before_names() -> None:
    assert label_names(["10", "9", "b", "a", "9"]) == ["9", "10", "a", "b"]

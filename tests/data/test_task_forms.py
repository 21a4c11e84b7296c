"""Data for other trainers than SFT: pairs, prompts, and texts with labels."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
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
    with pytest.raises(PacaError, match=r"(?s)columns: instruction, output.*\n.*preference: prompt, chosen, rejected"):
        load(tmp_path, "preferences", {"instruction": "a", "output": "b"})


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    texts = ["007", "true", '{"a": 1}', "é"]
    dataset = load(tmp_path, "prompts", *({"prompt": "p", "answer": text} for text in texts)).dataset
    assert list(dataset["answer"]) == texts


def test_prompts_keep_what_rewards_need_as_it_was(tmp_path: Path) -> None:
    records = [{"question": "2+2?", "answer": 4, "hints": {"n": [1, None]}}, {"question": "3?", "answer": "three"}]
    dataset = load(tmp_path, "prompts", *records).dataset
    assert dataset[0]["prompt"] == [USER]
    assert list(dataset["answer"]) == [4, "three"]
    assert list(dataset["hints"]) == [{"n": [1, None]}, None]


def test_prompts_as_text_or_messages_stay_so(tmp_path: Path) -> None:
    assert load(tmp_path, "prompts", {"prompt": "say"}).dataset[0]["prompt"] == "say"
    assert load(tmp_path, "prompts", {"prompt": [USER]}).dataset[0]["prompt"] == [USER]


@pytest.mark.parametrize(
    ("prompt", "why"), [("", "is empty"), (" ", "is empty"), (None, "is missing"), (3, "is a num")]
)
def test_a_prompt_of_nothing_is_refused(tmp_path: Path, prompt: object, why: str) -> None:
    """GRPO ended with a traceback of torch's where the tokenizer puts no token before an empty one."""
    with pytest.raises(PacaError, match=rf"line 2: prompt {why}(?!.*completion)"):
        load(tmp_path, "prompts", {"prompt": "say"}, {"prompt": prompt})


@pytest.mark.parametrize(("label", "expected"), [("good", "good"), (3, "3"), (True, "true")])
def test_labels_are_names(tmp_path: Path, label: object, expected: str) -> None:
    assert load(tmp_path, "labels", {"text": "a", "label": label}).dataset[0]["label"] == expected


@pytest.mark.parametrize("label", [None, "", 0.5, ["a"]])
def test_a_record_without_a_label_is_named(tmp_path: Path, label: object) -> None:
    with pytest.raises(PacaError, match=r"data.jsonl, line 2: label is .*; expected a name or a whole number"):
        load(tmp_path, "labels", {"text": "a", "label": "x"}, {"text": "b", "label": label})


def test_numbers_count_by_value_and_come_before_names() -> None:
    assert label_names(["10", "9", "b", "a", "9"]) == ["9", "10", "a", "b"]


ANSWERS = {"chosen": [{"role": "assistant", "content": "4"}], "rejected": [{"role": "assistant", "content": "5"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": [USER], **ANSWERS},
        {"prompt": USER["content"], **ANSWERS},
        {"question": USER["content"], "chosen": "4", "rejected": "5"},
        {"instruction": USER["content"], "chosen": "4", "rejected": "5"},
        {"prompt": USER["content"], **{name: [USER, *answer] for name, answer in ANSWERS.items()}},
        {name: [USER, *answer] for name, answer in ANSWERS.items()},
    ],
)
def test_pairs_of_all_forms_stand_below_their_system_message_and_tools(tmp_path: Path, pair: dict[str, Any]) -> None:
    examples = load(tmp_path, "preferences", {**pair, "system": "Be brief.", "tools": [TOOL]})
    example = examples.dataset[0]
    assert example["prompt"] == [{"role": "system", "content": "Be brief."}, USER]
    assert {name: example[name] for name in ANSWERS} == ANSWERS
    assert json.loads(example["tools"]) == [TOOL]
    assert "not used" not in examples.description
    assert "system, tools" in examples.description


def test_a_pairs_own_system_message_stays_the_only_one(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Be long."}
    example = load(tmp_path, "preferences", {"prompt": [own, USER], **ANSWERS, "system": "Be brief."}).dataset[0]
    assert example["prompt"] == [own, USER]
    assert "tools" not in example


@pytest.mark.parametrize(("beside", "named"), [({"system": "Be brief."}, "system"), ({"tools": [TOOL]}, "tools")])
def test_a_prompt_that_is_text_has_no_place_for_them(tmp_path: Path, beside: dict[str, Any], named: str) -> None:
    with pytest.raises(PacaError, match=rf"line 1: {named} goes with messages.*\(data.columns: {{question: prompt}}\)"):
        load(tmp_path, "preferences", {"prompt": "2+2=", "chosen": "4", "rejected": "5", **beside})
    none = dict.fromkeys(beside, "")
    assert load(tmp_path, "preferences", {"prompt": "2+2=", "chosen": "4", "rejected": "5", **none}).dataset[0]


def test_a_prompt_that_the_conversations_lack_is_refused(tmp_path: Path) -> None:
    record = {"prompt": "another question", **{name: [USER, *answer] for name, answer in ANSWERS.items()}}
    with pytest.raises(PacaError, match=r"none of their messages holds the prompt.*data.format: preference-implicit"):
        load(tmp_path, "preferences", record)
    longer = {**record, "prompt": f"Human: {USER['content']} Assistant:"}
    assert load(tmp_path, "preferences", longer).dataset[0]["prompt"] == [USER]
    load_path = tmp_path / "data.jsonl"
    load_path.write_text(json.dumps(record) + "\n")
    implicit = load_examples(str(tmp_path / "data.jsonl"), family="preferences", format="preference-implicit")
    assert implicit.dataset[0]["prompt"] == [USER]


def test_columns_that_the_first_record_lacks_are_there(tmp_path: Path) -> None:
    records = [{"prompt": "a"}, {"prompt": "b", "solution": 42}, {"prompt": "c", "hint": "x"}]
    examples = load(tmp_path, "prompts", *records)
    assert list(examples.dataset["solution"]) == [None, 42, None]
    assert list(examples.dataset["hint"]) == [None, None, "x"]
    again = load_examples(str(tmp_path / "data.jsonl"), family="prompts")  # now it is known which there are
    assert (again.dataset.to_list(), again.description) == (examples.dataset.to_list(), examples.description)
    limited = load_examples(str(tmp_path / "data.jsonl"), family="prompts", limit=2)
    assert sorted(limited.dataset.column_names) == ["origin", "prompt", "solution"]
    asked = {"question": "q", "answer": "a"}
    assert list(load(tmp_path, "text", asked, {**asked, "options": ["a", "b"]}).dataset["options"]) == [
        None,
        ["a", "b"],
    ]


def test_rewards_get_dates_as_text_and_no_bytes(tmp_path: Path) -> None:
    columns = {"blob": [b"\xff"], "image": [{"bytes": b"\xff", "path": "a"}], "day": [datetime.date(2026, 1, 2)]}
    pq.write_table(pa.table({"prompt": ["a"], **columns}), tmp_path / "x.parquet")
    examples = load_examples(str(tmp_path / "x.parquet"), family="prompts")
    assert examples.dataset[0] == {"prompt": "a", "day": "2026-01-02", "origin": "x.parquet, row 0"}
    assert "(not used: blob, image)" in examples.description


def test_a_parquet_files_class_labels_are_their_names(tmp_path: Path) -> None:
    """As from the hub: the same data set has the same labels however it is read."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    file = str(tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    assert list(load_examples(file, family="labels").dataset["label"]) == ["pos", "neg"]
    datasets.Dataset.from_list([*rows, {"text": "c", "label": -1}], features=features).to_parquet(file)
    with pytest.raises(PacaError, match=r"x.parquet, row 2: label is missing; expected a name or a whole number"):
        load_examples(file, family="labels")


def test_spaces_around_a_label_make_no_class_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,label\nfine,good\nawful, bad\nsad,bad\n")
    rows = load_examples(str(tmp_path / "data.csv"), family="labels").dataset
    assert list(rows["label"]) == ["good", "bad", "bad"]
    with pytest.raises(PacaError, match="label is ''"):
        load(tmp_path, "labels", {"text": "fine", "label": " "})

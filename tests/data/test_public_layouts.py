"""The layouts of public data sets (Oasst1, MMLU, ARC, folders of images): from a file here, and from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from data.loopback_hub import serving
from paca.data import load_examples
from paca.data.rows import rows_of
from paca.messages.errors import PacaError


def message(name: str, parent: str | None, role: str, rank: int | None = None, deleted: bool = False) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "text": f"text of {name}",
        "role": role,
        "rank": rank,
        "deleted": deleted,
        "message_tree_id": "a",
        "lang": "en",
    }


# Tree a: the answer of rank 0 is deleted, that of rank 1 goes on, and ends with a question nobody answers.
MESSAGES = [
    message("a1", "a", "assistant", rank=2),
    message("a", None, "prompter"),
    message("a2", "a", "assistant", rank=0, deleted=True),
    message("a3", "a", "assistant", rank=1),
    message("a4", "a", "assistant"),
    message("a31", "a3", "prompter", rank=1),
    message("a32", "a3", "prompter", rank=0),
    message("a321", "a32", "assistant", rank=0),
    message("a3211", "a321", "prompter", rank=0),
    message("b", None, "prompter"),
]
BEST = [("user", "a"), ("assistant", "a3"), ("user", "a32"), ("assistant", "a321")]
MMLU = [
    {"question": "What is 2+2?", "subject": "arithmetic", "choices": ["3", "4", "5", "22"], "answer": 1},
    {"question": "And 1+1?", "subject": "arithmetic", "choices": ["2", "3", "4", "11"], "answer": 0},
]
ARC = [
    {
        "id": "x",
        "question": "Is it?",
        "choices": {"text": ["yes", "no", "both"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    },
    {"id": "y", "question": "How many?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "1"},
]
ARC_OF_AI2 = [  # ARC as in the files of its makers, which nest the hub's columns in another way
    {
        "id": row["id"],
        "question": {
            "stem": row["question"],
            "choices": [
                {"text": text, "label": label}
                for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
            ],
        },
        "answerKey": row["answerKey"],
    }
    for row in ARC
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversation(example: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].removeprefix("text of ")) for turn in example["messages"]]


def nested(name: str) -> dict[str, Any]:
    found = next(entry for entry in MESSAGES if entry["message_id"] == name)
    replies = [nested(entry["message_id"]) for entry in MESSAGES if entry["parent_id"] == name]
    return {key: value for key, value in found.items() if key != "parent_id"} | {"replies": replies}


def test_single_messages_become_the_best_ranked_conversation_of_each_tree(tmp_path: Path) -> None:
    examples = load_examples(jsonl(tmp_path / "oasst.jsonl", MESSAGES))
    assert examples.format == "oasst-messages"
    assert [conversation(example) for example in examples.dataset] == [BEST]
    assert examples.dataset["origin"][:] == ["oasst.jsonl, line 2"]


def test_nested_trees_give_the_same_conversation(tmp_path: Path) -> None:
    trees = [{"message_tree_id": name, "tree_state": "ready", "prompt": nested(name)} for name in "ba"]
    examples = load_examples(jsonl(tmp_path / "trees.jsonl", trees))
    assert examples.format == "oasst-trees"
    assert [conversation(example) for example in examples.dataset] == [BEST]


@pytest.mark.parametrize("replies", [{"text": "a"}, ["a"], "a"])
def test_replies_that_are_no_messages_are_named(tmp_path: Path, replies: Any) -> None:
    tree = {"message_tree_id": "b", "prompt": {"text": "q", "role": "prompter", "replies": replies}}
    with pytest.raises(PacaError, match=r"line 1: in this tree, replies is .*; expected a list of messages"):
        load_examples(jsonl(tmp_path / "trees.jsonl", [tree]))


def test_a_rank_that_pandas_left_empty_comes_last(tmp_path: Path) -> None:
    rows = [{**entry, "rank": float("nan") if entry["rank"] is None else entry["rank"]} for entry in MESSAGES]
    rows.insert(0, {**message("z", "a", "assistant"), "rank": float("nan")})
    examples = load_examples(jsonl(tmp_path / "oasst.jsonl", rows))
    assert [conversation(example) for example in examples.dataset] == [BEST]


def test_messages_as_csv_give_the_same_conversation(tmp_path: Path) -> None:
    source = tmp_path / "oasst.csv"
    pandas.DataFrame(MESSAGES).to_csv(source, index=False)
    assert "assistant,0.0,False" in source.read_text()  # what pandas makes of a rank and of false
    examples = load_examples(str(source))
    assert [conversation(example) for example in examples.dataset] == [BEST]


@pytest.mark.parametrize("deleted", [None, "", "false", False, 0, float("nan")])
def test_messages_that_are_not_deleted_are_taken(tmp_path: Path, deleted: Any) -> None:
    rows = [{**entry, "deleted": entry["deleted"] or deleted} for entry in MESSAGES]
    examples = load_examples(jsonl(tmp_path / "oasst.jsonl", rows))
    assert [conversation(example) for example in examples.dataset] == [BEST]


def test_a_limit_counts_conversations_not_messages(tmp_path: Path) -> None:
    second = [{**entry, "message_id": f"c{entry['message_id']}"} for entry in MESSAGES]
    for entry in second:
        entry["parent_id"] = entry["parent_id"] and f"c{entry['parent_id']}"
    source = jsonl(tmp_path / "oasst.jsonl", MESSAGES + second)
    assert len(load_examples(source).dataset) == 2
    assert len(load_examples(source, limit=1).dataset) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"parent_id": "lost"}, r"line 1: the parent_id 'lost' is no message of this data"),
        ({"message_id": "a3"}, r"line 4: the message_id 'a3' stands in oasst.jsonl, line 1 as well"),
        ({"message_id": None}, r"line 1: message_id is None"),
        (
            {"role": "narrator", "rank": -1},
            r"line 2: in this tree, a message is of the role 'narrator'",
        ),
        ({"text": 5, "rank": -1}, r"text of a message is int; expected text"),
        ({"parent_id": ["b"]}, r"line 1: the parent_id \['b'\] is no message of this data"),
        ({"role": ["assistant"], "rank": -1}, r"line 2: in this tree, a message is of the role \['assistant'\]"),
        ({"rank": "best"}, r"line 2: in this tree, the rank of a message is 'best'; expected a number or null"),
        (
            {"deleted": "perhaps"},
            r"line 2: in this tree, deleted is 'perhaps' at a message; expected true, false or null",
        ),
        ({"message_id": "x", "parent_id": "x"}, r"line 1: the parents of the message 'x' go in a circle"),
    ],
)
def test_a_broken_tree_says_which_message(tmp_path: Path, changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(PacaError, match=expected):
        load_examples(jsonl(tmp_path / "oasst.jsonl", [{**MESSAGES[0], **changed}, *MESSAGES[1:]]))


def test_trees_that_nobody_answered_hold_no_example(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="no example of the form oasst-messages: nobody answers in it"):
        load_examples(jsonl(tmp_path / "oasst.jsonl", MESSAGES[-1:]))


def test_mmlu_lists_the_options_and_answers_with_a_letter(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "mmlu.jsonl", [MMLU[0], {**MMLU[1], "answer": 3}])
    examples = load_examples(source)
    assert examples.format == "mmlu"
    assert examples.dataset[0]["prompt"] == [{"role": "user", "content": "What is 2+2?\nA. 3\nB. 4\nC. 5\nD. 22"}]
    assert [example["completion"][0]["content"] for example in examples.dataset] == ["B", "D"]
    assert examples.dataset[0]["options"] == ["A", "B", "C", "D"]


def test_mmlu_takes_letters_as_answers_too(tmp_path: Path) -> None:
    examples = load_examples(jsonl(tmp_path / "mmlu.jsonl", [{**MMLU[0], "answer": "C"}]))
    assert examples.dataset[0]["completion"][0]["content"] == "C"


def test_mmlu_takes_a_column_for_each_option(tmp_path: Path) -> None:
    options = dict(zip("ABCD", MMLU[0]["choices"], strict=True))
    rows = [{"question": MMLU[0]["question"], **options, "answer": answer} for answer in ("B", 1)]
    examples = load_examples(jsonl(tmp_path / "mmlu.jsonl", rows))
    assert examples.format == "mmlu-letters"
    (expected,) = load_examples(jsonl(tmp_path / "one.jsonl", [MMLU[0]])).dataset
    for row in examples.dataset:
        assert {**row, "origin": ""} == {**expected, "origin": ""}


def test_mmlu_in_csv_takes_positions_and_as_many_options_as_a_question_has(tmp_path: Path) -> None:
    file = tmp_path / "mmlu.csv"
    file.write_text("question,A,B,C,D,E,answer\na?,10,20,30,40,,1\nb?,10,20,30,40,50,4.0\n")
    first, second = load_examples(str(file)).dataset
    assert (first["options"], first["completion"][0]["content"]) == (["A", "B", "C", "D"], "B")
    assert (second["options"], second["completion"][0]["content"]) == (["A", "B", "C", "D", "E"], "E")


def test_mmlus_own_files_have_no_header(tmp_path: Path) -> None:
    """Their first question was taken for the names of the columns."""
    (tmp_path / "anatomy_test.csv").write_text('"Which, of these?",3,4,5,6,B\nAnd of these?,7,8,"9, or 10",11,D\n')
    examples = load_examples(str(tmp_path))
    assert examples.format == "mmlu-letters"
    first, second = examples.dataset
    assert first["prompt"][0]["content"] == "Which, of these?\nA. 3\nB. 4\nC. 5\nD. 6"
    assert [row["completion"][0]["content"] for row in (first, second)] == ["B", "D"]


@pytest.mark.parametrize("header", ["question,answer,A,B,C,D", "Label,x,y,z,text,A"])
def test_a_header_that_ends_with_a_letter_is_a_header(tmp_path: Path, header: str) -> None:
    (tmp_path / "rows.csv").write_text(f"{header}\n1,2,3,4,5,6\n")
    assert [row for _, row in rows_of(tmp_path / "rows.csv")] == [dict(zip(header.split(","), "123456", strict=True))]


@pytest.mark.parametrize(("changed", "told"), [
    ({"B": None}, r"line 1: B is None; expected the text of an option"),
    ({"answer": "3"}, r"line 1: answer is '3', which may be a position or one of the choices\. Give its letter"),
    ({"answer": "the second"}, r"its letter\. If the answer is to be a text, give data\.format: question-answer"),
])  # fmt: skip
def test_mmlu_with_a_hole_in_its_options_is_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    row = {"question": "a?", "A": "3", "B": "4", "C": 5, "D": "6", "answer": "C"}
    assert load_examples(jsonl(tmp_path / "a.jsonl", [row])).dataset[0]["completion"][0]["content"] == "C"
    with pytest.raises(PacaError, match=told):
        load_examples(jsonl(tmp_path / "b.jsonl", [{**row, **changed}]))


def test_mmlu_with_its_options_in_a_list_and_in_columns_takes_the_list(tmp_path: Path) -> None:
    row = {**MMLU[0], **dict(zip("ABCD", MMLU[0]["choices"], strict=True))}
    assert load_examples(jsonl(tmp_path / "a.jsonl", [row])).format == "mmlu"


def test_a_list_as_python_writes_it_may_hold_apostrophes(tmp_path: Path) -> None:
    row = {"question": "a?", "choices": str(["it's", "no"]), "answer": "0"}
    assert "A. it's" in load_examples(jsonl(tmp_path / "a.jsonl", [row])).dataset[0]["prompt"][0]["content"]


@pytest.mark.parametrize("written", [json.dumps, str])
@pytest.mark.parametrize(("answer", "letter"), [("1", "B"), ("1.0", "B"), ("C", "C"), (2.0, "C")])
def test_mmlu_takes_lists_as_text_as_csv_files_have_them(
    tmp_path: Path, answer: object, letter: str, written: Callable[[object], str]
) -> None:
    rows = [{**MMLU[0], "choices": written(MMLU[0]["choices"]), "answer": answer}]
    examples = load_examples(jsonl(tmp_path / "mmlu.jsonl", rows))
    assert examples.dataset[0]["completion"][0]["content"] == letter


def test_arc_answers_with_its_own_labels_also_where_the_number_of_options_differs(tmp_path: Path) -> None:
    examples = load_examples(jsonl(tmp_path / "arc.jsonl", ARC))
    assert examples.format == "arc"
    assert examples.dataset[0]["prompt"][0]["content"] == "Is it?\nA. yes\nB. no\nC. both"
    assert [example["completion"][0]["content"] for example in examples.dataset] == ["C", "1"]
    assert [example["options"] for example in examples.dataset] == [["A", "B", "C"], ["1", "2"]]


def test_arc_as_its_makers_publish_it_is_read_like_the_hubs(tmp_path: Path) -> None:
    examples = load_examples(jsonl(tmp_path / "arc.jsonl", ARC))
    of_ai2 = load_examples(jsonl(tmp_path / "ai2" / "arc.jsonl", ARC_OF_AI2))
    assert of_ai2.format == "arc"
    assert of_ai2.dataset[:] == examples.dataset[:]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**MMLU[0], "answer": 4}, r"line 1: answer is 4; expected the position of one of the 4 choices"),
        ({**MMLU[0], "answer": True}, r"answer is True"),
        ({**MMLU[0], "choices": "3, 4"}, r"choices is '3, 4'; expected a list of texts"),
        ({**MMLU[0], "choices": ["4"]}, r"there are 1 choices; expected 2 to 26"),
        ({**MMLU[0], "choices": "['3' '4'\n '5' '6']"}, r"'3' '4'.* commas between them"),
        ({**ARC[0], "choices": {"text": ["yes", "no"], "label": ["A", "A"]}}, r"two of the choices have the label 'A'"),
        ({**ARC[0], "answerKey": "D"}, r"answerKey is 'D'; expected one of the labels A, B, C"),
        ({**ARC[0], "choices": {"text": ["yes"], "label": ["A", "B"]}}, r"lists text and label, equally long"),
        ({**ARC[0], "question": None}, r"question is None; expected text"),
        ({**ARC_OF_AI2[0], "question": "Is it?"}, r"choices is None; expected an object with the lists text and label"),
        ({**ARC_OF_AI2[0], "question": {"stem": "?", "choices": [{"text": "yes"}]}}, r"or a list of objects with text"),
    ],
)
def test_a_broken_question_says_what_was_expected(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(PacaError, match=expected):
        load_examples(jsonl(tmp_path / "questions.jsonl", [row]))


@pytest.mark.parametrize(
    ("rows", "format"), [(MESSAGES, "oasst-messages"), (MMLU, "mmlu"), (ARC, "arc")], ids=["oasst", "mmlu", "arc"]
)
def test_the_hub_gives_what_a_file_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], format: str
) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub" / "data" / "train-0.parquet")
    with serving(tmp_path / "hub", "some/data", monkeypatch, tmp_path / "cache"):
        examples = load_examples("some/data")
    here = load_examples(jsonl(tmp_path / "here.jsonl", rows))
    assert examples.format == here.format == format
    assert examples.dataset.remove_columns("origin")[:] == here.dataset.remove_columns("origin")[:]


def test_options_beside_a_question_and_its_answer_travel_along(tmp_path: Path) -> None:
    rows = [
        {"question": "Which is red?", "answer": "a rose", "options": ["the sea", "a rose"]},
        {"question": "Which is blue?", "answer": "the sea", "options": {"A": "the sea"}},  # of another kind: no options
    ]
    examples = load_examples(jsonl(tmp_path / "rows.jsonl", rows))
    assert examples.format == "question-answer"
    assert list(examples.dataset["options"]) == [["the sea", "a rose"], None]
    assert "the sea" not in examples.dataset[0]["prompt"][0]["content"]


@pytest.mark.parametrize("options", [["3", "4", "5"], '["3", "4", "5"]'])
def test_options_of_which_the_answer_names_one_by_letter_or_position_are_listed(tmp_path: Path, options: Any) -> None:
    """MMLU-Pro's layout; trained as they stood, the model would learn letters without what they mean."""
    listed = "And 1+1?\nA. 2\nB) 11"
    rows = [
        {"question": "What is 2+2?", "options": options, "answer": "B", "answer_index": 1},
        {"question": "What is 2+2?", "options": options, "answer": 1},
        {"question": listed, "options": ["2", "11"], "answer": "A"},
    ]
    examples = load_examples(jsonl(tmp_path / "pro.jsonl", rows))
    assert [example["prompt"][0]["content"] for example in examples.dataset] == [
        "What is 2+2?\nA. 3\nB. 4\nC. 5",
        "What is 2+2?\nA. 3\nB. 4\nC. 5",
        listed,
    ]
    assert [example["completion"][0]["content"] for example in examples.dataset] == ["B", "B", "A"]
    assert list(examples.dataset["options"]) == [["A", "B", "C"], ["A", "B", "C"], ["A", "B"]]


def test_options_beside_a_prompt_and_its_completion_travel_along(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4", "options": [" 3", " 4"]}
    examples = load_examples(jsonl(tmp_path / "rows.jsonl", [row]))
    assert examples.dataset[0]["options"] == [" 3", " 4"]


@pytest.mark.parametrize("count", [3, 6])
def test_records_by_name_in_one_object_are_refused_with_the_way_to_write_them(tmp_path: Path, count: int) -> None:
    """All names were listed as columns. With few, it may be one record whose fields are objects."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({f"id{n}": {"question": "a?", "answer": "b"} for n in range(count)}))
    if count == 3:
        assert len(list(rows_of(file))) == 1
        return
    with pytest.raises(PacaError, match="Write its values, of which the first is 'id0', as an array"):
        list(rows_of(file))


def test_a_line_that_was_cut_off_is_called_so(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"text": "tw\n')
    with pytest.raises(PacaError, match=r"line 2 is not valid JSON: Unterminated string starting \(column 10\)"):
        list(rows_of(file))


def test_an_array_within_a_file_of_lines_is_called_so(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('[\n{"text": "one"}\n]\n')
    with pytest.raises(
        PacaError, match=r"line 1 is not valid JSON: .*a line\. One array of them goes into a \.json file\."
    ):
        list(rows_of(file))

"""Several sources are trained as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from paca.data import load_examples, tokenize, training_template
from paca.data.overlap import shared
from paca.messages.errors import PacaError
from tiny_checkpoint import save_base

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CHATS = [
    {"messages": [{"role": "user", "content": f"Look {n}"}, {"role": "assistant", "content": "Yes"}], "tools": TOOLS}
    for n in range(2)
]
QUESTIONS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
TASKS = [{"instruction": "Add", "input": f"{n} and 1", "output": str(n + 1)} for n in range(2)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(row: dict[str, Any]) -> str:
    return str(row["messages" if "messages" in row else "prompt"][0]["content"])


def test_forms_that_become_messages_may_stand_beside_each_other(tmp_path: Path) -> None:
    names = [
        write(tmp_path / "chats.jsonl", CHATS),
        write(tmp_path / "a" / "train.jsonl", QUESTIONS),
        write(tmp_path / "b" / "train.jsonl", TASKS),
    ]
    examples = load_examples(names)
    rows = list(examples.dataset)
    assert [asked(row) for row in rows] == [
        "Look 0", "Look 1", "What is 0?", "What is 1?", "What is 2?", "Add\n\n0 and 1", "Add\n\n1 and 1",
    ]  # fmt: skip
    assert [row["messages"][-1]["content"] for row in rows] == ["Yes", "Yes", "0", "1", "2", "1", "2"]
    assert [row["tools"] is None for row in rows] == [False] * 2 + [True] * 5
    origins = [row["origin"] for row in rows]
    assert origins[0] == "chats.jsonl, line 1"  # the others are lines of two files of one name
    assert (origins[2], origins[5]) == ("a/train.jsonl, line 1", "b/train.jsonl, line 1")
    assert (examples.format, examples.source) == ("messages and question-answer and alpaca", ", ".join(names))
    assert examples.description.startswith("7 examples of 3 sources. ")
    assert all(name in examples.description for name in names)


def test_questions_among_conversations_are_trained_as_by_themselves(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_base(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert training_template(tokenizer) is None
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    both = tokenize(load_examples([questions, write(tmp_path / "chats.jsonl", CHATS)]), tokenizer).dataset
    alone = tokenize(load_examples(questions), tokenizer).dataset
    assert "messages" in both.column_names
    assert "prompt" in alone.column_names
    for one, other in zip(alone, both.select(range(len(QUESTIONS))), strict=True):
        assert (one["input_ids"], one["labels"]) == (other["input_ids"], other["labels"])


def test_what_is_given_for_one_holds_for_each(tmp_path: Path) -> None:
    rows = [{"input": row["question"], "answer": row["answer"]} for row in QUESTIONS]
    names = [write(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    examples = load_examples(names, limit=2, columns={"question": "input"}, format="question-answer")
    assert examples.dataset["origin"][:] == ["a.jsonl, line 1", "a.jsonl, line 2", "b.jsonl, line 1", "b.jsonl, line 2"]
    assert examples.format == "question-answer"


def test_columns_for_rewards_are_null_where_a_source_lacks_them(tmp_path: Path) -> None:
    names = [
        write(tmp_path / "a.jsonl", [{"question": "1 + 1?", "answer": 2}]),
        write(tmp_path / "b.jsonl", [{"question": "Open it", "code": "007"}]),
    ]
    rows = load_examples(names, family="prompts").dataset
    assert rows["answer"][:] == [2, None]
    assert rows["code"][:] == [None, "007"]


def test_columns_for_rewards_may_have_the_names_of_texts(tmp_path: Path) -> None:
    """Which only some sources have: they are not rendered."""
    names = [write(tmp_path / "plain.jsonl", QUESTIONS)]
    for column in ("text", "completion", "chosen", "messages"):
        names.append(write(tmp_path / f"{column}.jsonl", [{"question": "Which?", column: "word"}]))
    rows = load_examples(names, family="prompts").dataset
    assert len(rows) == len(QUESTIONS) + 4
    assert rows["text"][:] == [None] * len(QUESTIONS) + ["word", None, None, None]
    train = load_examples(names[2], family="prompts").dataset
    assert shared(train, train) == 1  # a completion that is a text beside a prompt of messages


def test_where_examples_are_from_follows_no_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the hash by which a run knows its data again. And a source may be named twice."""
    for name in "ab":
        write(tmp_path / name / "train.jsonl", [*QUESTIONS, {"question": name, "answer": name}])
    monkeypatch.chdir(tmp_path)
    relative = load_examples(["a/train.jsonl", "b/train.jsonl", "b/train.jsonl"])
    monkeypatch.chdir("/")
    absolute = load_examples([str(tmp_path / name / "train.jsonl") for name in "abb"])
    assert relative.content() == absolute.content()
    assert relative.dataset["origin"][::4] == [f"{name}/train.jsonl, line 1" for name in "abb"]


def test_one_source_in_a_list_is_that_source(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", QUESTIONS)
    assert load_examples([name]).content() == load_examples(name).content()


def test_held_out_questions_are_found_among_conversations(tmp_path: Path) -> None:
    questions = write(tmp_path / "questions.jsonl", QUESTIONS)
    train = load_examples([questions, write(tmp_path / "chats.jsonl", CHATS)])
    assert shared(train.dataset, load_examples(questions).dataset) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([{"text": "Once."}], r"-answer\) gives messages, and .*\(form text\) gives text as plain text: "),
        ([{"prompt": "Q", "completion": "A"}], r"\(form prompt-completion\) gives prompt and completion as plain text"),
    ],
)
def test_texts_and_messages_are_refused_together(tmp_path: Path, others: list[dict[str, str]], said: str) -> None:
    names = [write(tmp_path / "questions.jsonl", QUESTIONS), write(tmp_path / "others.jsonl", others)]
    with pytest.raises(PacaError, match=said + r".*into one form \(data.train\)"):
        load_examples(names)


def test_earlier_answers_in_a_prompt_are_not_trained_unnoticed(tmp_path: Path) -> None:
    prompt = [{"role": role, "content": "Well?"} for role in ("user", "assistant", "user")]
    talk = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes"}]}]
    names = [write(tmp_path / "chats.jsonl", CHATS), write(tmp_path / "talk.jsonl", talk)]
    with pytest.raises(PacaError, match=r"^talk.jsonl, line 1: the prompt has answers, of which none is trained"):
        load_examples(names)
    assert "prompt" in load_examples([names[1], write(tmp_path / "q.jsonl", QUESTIONS)]).dataset.column_names


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(PacaError, match=r"The list of data sources is empty. Name at least one"):
        load_examples([])

"""Recognising the form of training data, and turning a row of it into an example."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paca.data.formats import FORMATS
from paca.data.recognition import recognise
from paca.messages.errors import PacaError

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def convert(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return FORMATS[name].convert(row)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages"], "messages"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["instruction", "output"], "alpaca"),
        (["instruction", "input", "output", "answer"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["id", "conversations"], "sharegpt"),
        (["question", "answer"], "question-answer"),
        (["type", "query", "original_question", "response"], "query-response"),
        (["text", "url"], "text"),
    ],
)
def test_the_form_is_recognised_from_the_columns(columns: list[str], expected: str) -> None:
    assert recognise(columns, None, "data.jsonl").name == expected


def test_an_unknown_form_lists_what_was_found_and_what_is_understood() -> None:
    with pytest.raises(PacaError) as error:
        recognise(["titel", "inhalt"], None, "data.jsonl")
    for part in ["data.jsonl", "titel, inhalt", *FORMATS]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["input", "output"], "alpaca, so give data.columns: {instruction: input}."),
        (["id", "question", "reply"], "question-answer, so give data.columns: {answer: ...}."),
        (["frage", "antwort"], "question-answer, so give data.columns: {question: frage, answer: antwort}."),
        (["id", "frage", "antwort"], "question-answer, so give data.columns: {question: ..., answer: ...}."),
        (["content"], "text, so give data.columns: {text: content}."),
    ],
)
def test_columns_of_other_names_are_to_be_named_as_the_nearest_form_has_them(columns: list[str], told: str) -> None:
    with pytest.raises(PacaError) as error:
        recognise(columns, None, "data.jsonl")
    second = str(error.value).splitlines()[1]  # before the list of all forms
    nearest = f"Say which columns it has under other names: the nearest form is {told.removesuffix('.')}"
    assert second.startswith(f"{nearest} (its name: yours) in the run's YAML (or --set data.columns.NAME=YOURS), or ")


def test_an_ambiguous_form_asks_for_a_choice_which_is_then_taken() -> None:
    columns = ["question", "answer", "instruction", "output"]
    with pytest.raises(PacaError, match=r"'alpaca' and 'question-answer'.*data\.format"):
        recognise(columns, None, "data.jsonl")
    assert recognise(columns, "question-answer", "data.jsonl").name == "question-answer"


def test_a_requested_form_is_checked() -> None:
    with pytest.raises(PacaError, match=r"needs output.*instruction, response"):
        recognise(["instruction", "response"], "alpaca", "data.jsonl")
    with pytest.raises(PacaError, match="Did you mean 'alpaca'"):
        recognise(["instruction", "output"], "alpacca", "data.jsonl")


def test_alpaca_becomes_two_messages() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert convert("alpaca", row) == {
        "prompt": [{"role": "user", "content": "Add.\n\n2 and 2"}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    without_input = {"instruction": "Say hi.", "input": "", "output": "hi"}
    assert convert("alpaca", without_input)["prompt"] == [{"role": "user", "content": "Say hi."}]


def test_question_and_answer_become_two_messages() -> None:
    row = {"question": "2+2?", "answer": "4"}
    assert convert("question-answer", row) == {"prompt": [USER], "completion": [ASSISTANT]}


def test_sharegpt_speakers_become_roles() -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "gpt", "value": "let me look"},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    messages = convert("sharegpt", {"conversations": turns, "system": "Be brief."})["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "Be brief."
    assert messages[-1]["content"] == "It rains."


def test_prompt_and_completion_stay_as_they_are() -> None:
    assert convert("prompt-completion", {"prompt": "2+2=", "completion": "4"}) == {"prompt": "2+2=", "completion": "4"}
    example = convert("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]})
    assert (example["prompt"], example["completion"]) == ([USER], [ASSISTANT])


def test_tool_messages_and_tools_pass_through() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "name": "add", "content": "4"},
        ASSISTANT,
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    example = convert("messages", {"messages": messages, "tools": tools})
    assert example["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert example["messages"][2] == messages[2]
    assert json.loads(example["tools"]) == tools
    assert convert("messages", {"messages": messages, "tools": json.dumps(tools)}) == example


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"text": 5}, "text is a number; expected text. Put it in quotes."),
        ("alpaca", {"instruction": "a", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": ["a"], "output": "b"}, "instruction is a list of text"),
        ("alpaca", {"instruction": "a", "input": {"b": 1}, "output": "b"}, "input is an object"),
        ("question-answer", {"question": "a", "answer": None}, "answer is missing"),
        ("prompt-completion", {"prompt": "a", "completion": "  "}, "completion is empty"),
        ("prompt-completion", {"prompt": [USER], "completion": "4"}, "two strings, or two lists"),
        ("prompt-completion", {"prompt": [ASSISTANT], "completion": [ASSISTANT]}, "ends with a message of 'assistant'"),
        ("prompt-completion", {"prompt": [USER], "completion": [USER]}, "begins with a message of 'user'"),
        ("messages", {"messages": "hi"}, "messages is text; expected a list of objects"),
        ("messages", {"messages": []}, "empty list"),
        ("messages", {"messages": [USER]}, "no message of 'assistant'"),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty message of 'assistant'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content is a list of an object",
        ),
        ("messages", {"messages": [USER, ASSISTANT], "tools": "{"}, "tools is not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\].value is missing"),
    ],
)
def test_a_bad_field_is_named(form: str, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(PacaError, match=expected):
        convert(form, row)


def test_messages_may_come_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A test."}]
    assert FORMATS["messages"].convert({"messages": messages})["messages"][0]["content"] == "What is this?"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": None}, r"messages\[0\]\.content is null; expected text"),
        ({"role": "user", "text": "a"}, r"messages\[0\]\.content is not there; the message has role, text; expected"),
        ({"role": "asistant", "content": "a"}, r"has the role 'asistant'; expected one of .* Did you mean 'assistant'"),
        ({"role": "gpt", "content": "a"}, r"has the role 'gpt'; .* Rename it to 'assistant'\."),
        ({"from": "user", "content": "a"}, r"has the role None; expected one of .* Its keys are from, content\."),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content is a list of an object; expected text"),
        ({"role": "user", "content": []}, r"content is an empty list; expected text"),
    ],
)
def test_a_message_that_can_not_be_read_says_what_it_has(message: dict[str, Any], told: str) -> None:
    with pytest.raises(PacaError, match=told):
        FORMATS["messages"].convert({"messages": [message]})


def test_arguments_that_are_json_text_become_objects() -> None:
    """As OpenAI's interface has them; a template would write them as a text within quotes."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    flat, odd = {"name": "add", "arguments": '{"a": 2}'}, {"name": "add", "arguments": "2 and 2"}
    asked = [USER, {"role": "assistant", "tool_calls": [call, flat, odd]}, {"role": "tool", "content": "4"}, ASSISTANT]
    made = convert("messages", {"messages": asked})["messages"][1]["tool_calls"]
    assert made[0] == {**call, "function": {"name": "add", "arguments": {"a": 2}}}
    assert made[1:] == [{"name": "add", "arguments": {"a": 2}}, odd]
    assert call["function"]["arguments"] == '{"a": 2}'


@pytest.mark.parametrize("tools", ["", " ", "[]", "null", [], None])
def test_no_tools_may_be_said_in_many_ways(tools: object) -> None:
    answer = {**ASSISTANT, "tool_calls": []}
    assert convert("messages", {"messages": [USER, answer], "tools": tools}) == {
        "messages": [USER, ASSISTANT],
        "tools": None,
    }


def test_tools_that_are_none_are_refused() -> None:
    with pytest.raises(PacaError, match="tools is a number; expected a list of objects"):
        convert("messages", {"messages": [USER, ASSISTANT], "tools": "3"})
    with pytest.raises(PacaError, match=r"messages\[1\].tool_calls is text; expected a list of objects"):
        convert("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": "add"}]})


def test_a_system_turn_comes_before_the_column() -> None:
    turns = [{"from": "system", "value": "Be long."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    messages = convert("sharegpt", {"conversations": turns, "system": "Be brief."})["messages"]
    assert [message["content"] for message in messages] == ["Be long.", "a", "b"]

"""The forms that training data comes in, and how a row of each becomes a training example."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paca.data.choices import (
    LAST_LETTER,
    LETTERS,
    OPTIONS,
    arc_question,
    lettered_question,
    mmlu_question,
    named_by_letter,
)
from paca.data.message_trees import FLAT_COLUMNS, OF_USE, TREE_COLUMNS, answered_trees, best_path, trees_of_messages
from paca.data.rows import Row
from paca.data.tool_calls import with_arguments
from paca.messages.errors import NothingToLearn, PacaError
from paca.messages.nearest import did_you_mean

Example = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Who speaks, in the data sets that circulate as ShareGPT.
_SPEAKERS = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}

_RENAME = " Rename it in the data, or take such records out."


@dataclass(frozen=True)
class Format:
    """One form of training data."""

    name: str

    columns: tuple[str, ...]
    """The columns that a row of this form is made from."""

    optional: tuple[str, ...]
    """Those of them that may be absent."""

    convert: Callable[[Row], Example]
    """Turn a row into an example."""

    gather: Callable[[Iterable[tuple[str, Row]]], Iterator[tuple[str, Row]]] | None = None
    """Where several rows make one example, or some make none: turns the data's `(place, row)` into those to convert."""

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that must be there."""
        return tuple(column for column in self.columns if column not in self.optional)


def _from_messages(row: Row) -> Example:
    return _conversation(_messages(row["messages"], "messages"), row.get("tools"))


def _from_sharegpt(row: Row) -> Example:
    messages: list[Message] = []
    for index, turn in enumerate(_list_of_objects(row["conversations"], "conversations")):
        name, speaker = f"conversations[{index}]", turn.get("from")
        if "role" in turn:
            messages.extend(_messages([turn], name))
            continue
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise PacaError(f"{name} is from {speaker!r}; known are: {', '.join(_SPEAKERS)}.{_RENAME}")
        messages.append({"role": _SPEAKERS[speaker], "content": _text(turn.get("value"), f"{name}.value")})
    return _conversation(with_system(messages, row.get("system")), row.get("tools"))


def _from_prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": some_text(completion, "completion"), **_options(row)}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise _refusal(None if None in (prompt, completion) else prompt)(
            f"prompt is {_kind(prompt)} and completion is {_kind(completion)}; expected two strings, or two lists of "
            "messages."
        )
    question, answer = _messages(prompt, "prompt"), _messages(completion, "completion")
    if question[-1]["role"] not in ("user", "tool"):
        raise PacaError(f"the prompt ends with a message of {question[-1]['role']!r}; expected 'user' or 'tool'.")
    if answer[0]["role"] != "assistant":
        raise PacaError(f"the completion begins with a message of {answer[0]['role']!r}; expected 'assistant'.")
    _require_an_answer(answer, "completion")
    return {"prompt": question, "completion": answer, **tools_of(row), **_options(row)}


def _from_alpaca(row: Row) -> Example:
    instruction = _text(row["instruction"], "instruction")
    given = _text(row.get("input") or "", "input")
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _question_and_answer(question, some_text(row["output"], "output"))


def _from_question_answer(row: Row) -> Example:
    row = named_by_letter(row) or row
    question, answer = _text(row["question"], "question"), some_text(row["answer"], "answer")
    return {**_question_and_answer(question, answer), **_options(row)}


def _options(row: Row) -> Example:
    """What could be answered, where the row has such a column; null if that is no list of texts."""
    if OPTIONS not in row:
        return {}
    options = row[OPTIONS]
    return {OPTIONS: options if isinstance(options, list) and all(isinstance(one, str) for one in options) else None}


def _from_query_response(row: Row) -> Example:
    return _from_question_answer({"question": row["query"], "answer": row["response"]})


def _from_text(row: Row) -> Example:
    return {"text": some_text(row["text"], "text")}


def _from_choices(read: Callable[[Row], Row]) -> Callable[[Row], Example]:
    """The labels are what is answered, and travel along: scoring by choice compares them."""
    return lambda row: _from_question_answer(read(row))


def _from_tree(row: Row) -> Example:
    return _conversation(best_path(row["prompt"]), None)


def _question_and_answer(question: str, answer: str) -> Example:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def _conversation(messages: list[Message], tools: object) -> Example:
    if not any(message["role"] == "assistant" for message in messages):
        raise NothingToLearn("the conversation has no message of 'assistant', so there is nothing to learn.")
    _require_an_answer(messages, "conversation")
    return {"messages": messages, **_tools(tools)}


def with_system(messages: list[Message], system: object) -> list[Message]:
    """The messages below what a column `system` says, unless they have a system message of their own."""
    if not system or any(message["role"] in ("system", "developer") for message in messages):
        return messages
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def tools_of(row: Row) -> Example:
    """The column `tools` of a row, which may lack it."""
    return _tools(row.get("tools"))


def _require_an_answer(messages: list[Message], name: str) -> None:
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise NothingToLearn(f"the {name} has an empty message of 'assistant'. Remove the example, or fill it in.")


def _messages(value: object, name: str) -> list[Message]:
    messages = []
    for index, given in enumerate(_list_of_objects(value, name)):
        # Where a file gives every message all fields, null where they do not apply.
        message = {key: field for key, field in given.items() if field is not None}
        role = message.get("role")
        if role not in ROLES:
            keys = f" Its keys are {', '.join(given)}." if role is None else did_you_mean(str(role), ROLES) or _RENAME
            if isinstance(role, str) and role in _SPEAKERS:
                keys = f" Rename it to {_SPEAKERS[role]!r}."
            raise PacaError(f"{name}[{index}] has the role {role!r}; expected one of {', '.join(ROLES)}.{keys}")
        if "content" not in message and message.get("tool_calls"):
            message["content"] = ""
        if "content" not in message:
            how = "null" if "content" in given else f"not there; the message has {', '.join(given)}"
            raise NothingToLearn(f"{name}[{index}].content is {how}; expected text.")
        message["content"] = _text(_joined(message["content"]), f"{name}[{index}].content")
        if calls := message.pop("tool_calls", None):
            listed = _list_of_objects(calls, f"{name}[{index}].tool_calls", "call")
            message["tool_calls"] = [with_arguments(call) for call in listed]
        messages.append(message)
    return messages


def _joined(content: object) -> object:
    """The text of a message that comes in parts, as OpenAI's interface gives it; anything else as it is."""
    parts = content if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    whole = texts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _list_of_objects(value: object, name: str, one: str = "message") -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(element, dict) for element in value):
        raise _refusal(value)(f"{name} is {_kind(value)}; expected a list of objects.")
    if not value:
        raise NothingToLearn(f"{name} is an empty list; expected at least one {one}.")
    return value


def _tools(tools: object) -> Example:
    """Tool definitions travel as JSON text, the way TRL takes them: their fields differ from tool to tool."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise PacaError(f"tools is not valid JSON: {error.msg}.") from error
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return {"tools": None}
    return {"tools": json.dumps(_list_of_objects(tools, "tools"), ensure_ascii=False)}


def _text(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    column = ", or make the column of a table text (in pandas: .astype(str))" if name.isidentifier() else ""
    advice = f" Put it in quotes{column}." if _kind(value) == "a number" else ""  # it may be an option's position
    raise _refusal(value)(f"{name} is {_kind(value)}; expected text.{advice}")


def _refusal(value: object) -> type[PacaError]:
    """The error for a value of the wrong kind; a record without any may be left out (`data.unusable`)."""
    return NothingToLearn if value is None else PacaError


def some_text(value: object, name: str) -> str:
    text = _text(value, name)
    if not text.strip():
        raise NothingToLearn(f"{name} is empty, so there is nothing to learn. Remove the example, or fill it in.")
    return text


def same_start(one: Sequence[object], other: Sequence[object]) -> int:
    """With how many equal elements two texts, or two lists of messages or tokens, begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {_kind(value[0])}" if value else "an empty list"
    names = {dict: "an object", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)


FORMATS = {
    form.name: form
    for form in (
        Format("messages", ("messages", "tools"), ("tools",), _from_messages),
        Format(
            "prompt-completion", ("prompt", "completion", "tools", OPTIONS), ("tools", OPTIONS), _from_prompt_completion
        ),
        Format("alpaca", ("instruction", "input", "output"), ("input",), _from_alpaca),
        Format("sharegpt", ("conversations", "system", "tools"), ("system", "tools"), _from_sharegpt),
        Format("question-answer", ("question", "answer", OPTIONS), (OPTIONS,), _from_question_answer),
        Format("query-response", ("query", "response"), (), _from_query_response),
        Format("mmlu", ("question", "choices", "answer"), (), _from_choices(mmlu_question)),
        Format(
            "mmlu-letters",
            ("question", *LETTERS, LAST_LETTER, "answer"),
            (LAST_LETTER,),
            _from_choices(lettered_question),
        ),
        Format("arc", ("question", "choices", "answerKey"), ("choices",), _from_choices(arc_question)),
        Format("oasst-messages", (*FLAT_COLUMNS, *OF_USE), OF_USE, _from_tree, trees_of_messages),
        Format("oasst-trees", TREE_COLUMNS, (), _from_tree, answered_trees),
        Format("text", ("text",), (), _from_text),
    )
}

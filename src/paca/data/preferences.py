"""Pairs of answers, one preferred to the other: what DPO and reward models learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paca.data.formats import FORMATS, Example, Format, Message, _messages, same_start, tools_of, with_system
from paca.data.rows import Row
from paca.messages.errors import NothingToLearn, PacaError

PAIR = ("chosen", "rejected")
BESIDE = ("system", "tools")
"""Columns that any form may have beside the pair: what stands above a prompt of messages."""


def _pair(form: str, answer: str) -> Callable[[Row], Example]:
    """A pair as two rows of a form with one answer: the same prompt, and what each column answers."""

    def convert(row: Row) -> Example:
        made = {}
        for name in PAIR:
            try:
                made[name] = FORMATS[form].convert({**row, answer: row[name]})
            except PacaError as error:
                raise type(error)(f"with {name} as the {answer}: {error}") from None
        if made["chosen"] == made["rejected"]:
            raise NothingToLearn("chosen and rejected are the same, so there is nothing to prefer. Remove the record.")
        prompt, tools = made["chosen"]["prompt"], tools_of(row)
        if isinstance(prompt, list):
            prompt = with_system(prompt, row.get("system"))
        elif row.get("system") or tools["tools"]:
            raise PacaError(
                f"{'system' if row.get('system') else 'tools'} goes with messages, and the prompt is text. Let a chat "
                "template render it, as a column question (data.columns: {question: prompt}), give it as messages, or "
                "take that column out."
            )
        if tools["tools"] is None:
            tools = {}
        return {"prompt": prompt, **{name: made[name]["completion"] for name in PAIR}, **tools}

    return convert


def _explicit(row: Row) -> Example:
    prompt, chosen = row["prompt"], row["chosen"]
    if isinstance(prompt, str) and isinstance(chosen, list):
        conversation = _messages(chosen, "chosen")
        if conversation[0]["role"] != "assistant":  # they repeat the prompt
            if not any(_has_one_in_the_other(prompt, message) for message in conversation[:-1]):
                raise PacaError(
                    "chosen and rejected are whole conversations, and none of their messages holds the prompt. For "
                    "what they begin with as the prompt, give data.format: preference-implicit; or let them hold "
                    "answers alone."
                )
            return _implicit(row)
        row = {**row, "prompt": [{"role": "user", "content": prompt}]}
    if isinstance(prompt, list):
        answers = {name: row[name] for name in PAIR if isinstance(row[name], str)}
        row |= {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return _pair("prompt-completion", "completion")(row)


def _implicit(row: Row) -> Example:
    chosen, rejected = (row[name] for name in PAIR)
    if isinstance(chosen, list) and isinstance(rejected, list):
        both: Any = (_messages(chosen, "chosen"), _messages(rejected, "rejected"))
        shared = min(same_start(*both), len(chosen) - 1, len(rejected) - 1)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        both = (chosen, rejected)
        start = chosen[: same_start(chosen, rejected)]
        shared = max(start.rfind(" "), start.rfind("\n") + 1)  # whole words, which tokens seldom join
    else:
        error = NothingToLearn if None in (chosen, rejected) else PacaError
        raise error("chosen and rejected must be two texts, or two lists of messages.")
    if shared < 1:
        raise PacaError("chosen and rejected begin differently, so no prompt is in them. Give it as the column prompt.")
    prompt = both[0][:shared]
    return _explicit({**row, "prompt": prompt, **{n: text[shared:] for n, text in zip(PAIR, both, strict=True)}})


def _has_one_in_the_other(prompt: str, message: Message) -> bool:
    asked, said = (" ".join(text.split()) for text in (prompt, message["content"]))
    return asked in said or (message["role"] == "user" and bool(said) and said in asked)


PREFERENCES = {
    form.name: form
    for form in (
        Format("preference", ("prompt", *PAIR, *BESIDE), BESIDE, _explicit),
        Format("preference-question", ("question", *PAIR, *BESIDE), BESIDE, _pair("question-answer", "answer")),
        Format(
            "preference-instruction",
            ("instruction", "input", *PAIR, *BESIDE),
            ("input", *BESIDE),
            _pair("alpaca", "output"),
        ),
        Format("preference-implicit", (*PAIR, *BESIDE), BESIDE, _implicit),
    )
}

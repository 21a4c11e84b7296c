"""Pairs of answers, one preferred to the other: what DPO and reward models learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paca.data.formats import FORMATS, Example, Format, _messages, same_start
from paca.data.rows import Row
from paca.messages.errors import NothingToLearn, PacaError

PAIR = ("chosen", "rejected")


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
        prompt = made["chosen"]["prompt"]
        if row.get("system") and isinstance(prompt, list):
            prompt = [{"role": "system", "content": str(row["system"])}, *prompt]
        return {"prompt": prompt, **{name: made[name]["completion"] for name in PAIR}}

    return convert


def _explicit(row: Row) -> Example:
    prompt, chosen = row["prompt"], row["chosen"]
    if isinstance(prompt, str) and isinstance(chosen, list):
        if _messages(chosen, "chosen")[0]["role"] != "assistant":
            return _implicit(row)  # whole conversations, which repeat the prompt
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
        raise PacaError("chosen and rejected must be two texts, or two lists of messages.")
    if shared < 1:
        raise PacaError("chosen and rejected begin differently, so no prompt is in them. Give it as the column prompt.")
    prompt = both[0][:shared]
    return _explicit({"prompt": prompt, **{n: text[shared:] for n, text in zip(PAIR, both, strict=True)}})


PREFERENCES = {
    form.name: form
    for form in (
        Format("preference", ("prompt", *PAIR), (), _explicit),
        Format("preference-question", ("question", "system", *PAIR), ("system",), _pair("question-answer", "answer")),
        Format("preference-instruction", ("instruction", "input", *PAIR), ("input",), _pair("alpaca", "output")),
        Format("preference-implicit", PAIR, (), _implicit),
    )
}

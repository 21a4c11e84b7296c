"""Prompts to answer, with whatever a reward function needs to judge the answers: what GRPO learns from."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, time
from typing import Any

from paca.data.formats import FORMATS, Example, Format, some_text
from paca.data.rows import Row

_ANYTHING = "."
"""Stands for the answer, which is not there yet."""


def _prompt(form: str, answer: str) -> Callable[[Row], Example]:
    """The prompt that a form with an answer would have. The other columns travel along, as far as JSON holds them."""

    def convert(row: Row) -> Example:
        is_messages = isinstance(row.get("prompt"), list)
        if answer == "completion" and not is_messages:
            some_text(row.get("prompt"), "prompt")  # of an empty one a tokenizer may make no token, and so no answer
        given = [{"role": "assistant", "content": _ANYTHING}] if is_messages else _ANYTHING
        beside = {name: _in_json(value) for name, value in row.items() if not _has_bytes(value)}
        return {**beside, "prompt": FORMATS[form].convert({**row, answer: given})["prompt"]}

    return convert


def _in_json(value: Any) -> Any:
    """A value as a reward gets it: dates and times as text."""
    if isinstance(value, dict):
        return {name: _in_json(field) for name, field in value.items()}
    if isinstance(value, list):
        return [_in_json(one) for one in value]
    return value.isoformat() if isinstance(value, date | time) else value


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


PROMPTS = {
    form.name: form
    for form in (
        Format("prompt", ("prompt",), (), _prompt("prompt-completion", "completion")),
        Format("question", ("question",), (), _prompt("question-answer", "answer")),
        Format("instruction", ("instruction", "input"), ("input",), _prompt("alpaca", "output")),
    )
}

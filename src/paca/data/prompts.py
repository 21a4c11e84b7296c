"""Prompts to answer, with whatever a reward function needs to judge the answers: what GRPO learns from."""

from __future__ import annotations

from collections.abc import Callable

from paca.data.formats import FORMATS, Example, Format
from paca.data.rows import Row

_ANYTHING = "."
"""Stands for the answer, which is not there yet."""


def _prompt(form: str, answer: str) -> Callable[[Row], Example]:
    """The prompt that a form with an answer would have. The other columns travel along."""

    def convert(row: Row) -> Example:
        is_messages = isinstance(row.get("prompt"), list)
        given = [{"role": "assistant", "content": _ANYTHING}] if is_messages else _ANYTHING
        return {**row, "prompt": FORMATS[form].convert({**row, answer: given})["prompt"]}

    return convert


PROMPTS = {
    form.name: form
    for form in (
        Format("prompt", ("prompt",), (), _prompt("prompt-completion", "completion")),
        Format("question", ("question",), (), _prompt("question-answer", "answer")),
        Format("instruction", ("instruction", "input"), ("input",), _prompt("alpaca", "output")),
    )
}

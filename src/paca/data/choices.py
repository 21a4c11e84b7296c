"""Questions with given options, in the layouts of MMLU and of ARC: as questions that list them, answered by a label."""

from __future__ import annotations

import ast
import json
import re
import string
from contextlib import suppress
from typing import TypeGuard

from paca.data.rows import Row
from paca.messages.errors import NothingToLearn, PacaError

OPTIONS = "options"
"""The column with all answers that could be given; the completion is one of them."""
LETTERS = ("A", "B", "C", "D")
"""Columns of options in MMLU's own files."""
LAST_LETTER = "E"
"""Of some data in that layout."""
_POSITION = re.compile(r"[0-9]{1,2}(\.0)?")


def mmlu_question(row: Row) -> Row:
    """Read `question`, `choices` (a list, also as text in JSON or as Python writes lists) and `answer`: its position,
    counted from 0, or its letter.

    Raises:
        PacaError: A field is of another kind, or the answer is none of the choices.
    """
    options, answer = _as_list(row["choices"]), row["answer"]
    if not _is_texts(options):
        raise PacaError(f"choices is {options!r}; expected a list of texts.")
    if isinstance(row["choices"], str) and len(options) == 1:
        raise PacaError(
            f"choices is {row['choices']!r}; expected a list of texts with commas between them. pandas writes arrays "
            "without: give Parquet, or turn them into lists before."
        )
    if isinstance(answer, str) and _POSITION.fullmatch(answer):
        if answer in options:
            raise PacaError(f"answer is {answer!r}, which may be a position or one of the choices. Give its letter.")
        answer = int(float(answer))
    labels = _letters(len(options))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # pandas makes floats of a column that lacks some
    position = labels.index(answer) if answer in labels else answer
    if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(options):
        raise (NothingToLearn if answer in (None, "") else PacaError)(
            f"answer is {answer!r}; expected the position of one of the {len(options)} choices, counted from 0, or its "
            "letter."
        )
    return _asked(row["question"], labels, options, labels[position])


def named_by_letter(row: Row) -> Row | None:
    """A row with `options`, whose `answer` is the letter or position of one and none of them itself (as in MMLU-Pro),
    read as `mmlu_question` does, where it does not list them already; of any other row None."""
    options, answer = _as_list(row.get(OPTIONS)), row["answer"]
    if not _is_texts(options) or not 2 <= len(options) <= len(string.ascii_uppercase) or answer in options:
        return None
    labels = _letters(len(options))
    if answer not in labels and (isinstance(answer, bool) or not isinstance(answer, int)):
        return None
    question = row["question"]
    listed = (rf"\b{label}\W{{1,3}}{re.escape(option.strip())}" for label, option in zip(labels, options, strict=True))
    if isinstance(question, str) and answer in labels and all(re.search(one, question) for one in listed):
        return {**row, OPTIONS: labels}
    return mmlu_question({"question": question, "choices": options, "answer": answer})


def lettered_question(row: Row) -> Row:
    """Read `question`, `A` to `D` (or `E`), as in MMLU's own files, and `answer`, as `mmlu_question` does.

    Raises:
        PacaError: An option is missing or no text, or the answer is none of them.
    """
    options = [row.get(letter) for letter in (*LETTERS, LAST_LETTER)]
    options = [str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in options]
    while options and options[-1] in (None, ""):  # there are as many as this question has
        options.pop()
    for letter, option in zip((*LETTERS, LAST_LETTER), options, strict=False):
        if not isinstance(option, str) or not option:
            raise PacaError(f"{letter} is {option!r}; expected the text of an option, as later letters have one.")
    try:
        return mmlu_question({"question": row["question"], "choices": options, "answer": row["answer"]})
    except PacaError as error:
        raise type(error)(f"{error} If the answer is to be a text, give data.format: question-answer.") from None


def arc_question(row: Row) -> Row:
    """Read `question`, `choices` (with the lists `text` and `label`) and `answerKey`, one of the labels.

    That is the hub's layout. In AI2's own files `question` holds both: `stem`, and `choices`, a list of objects with
    `text` and `label`.

    Raises:
        PacaError: A field is of another kind, or the answer is none of the labels.
    """
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        choices, question = question.get("choices"), question.get("stem")
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    else:
        listed: list[Row] = (
            choices if isinstance(choices, list) and all(isinstance(one, dict) for one in choices) else []
        )
        texts, labels = ([one.get(name) for one in listed] or None for name in ("text", "label"))
    if not _is_texts(texts) or not _is_texts(labels) or len(texts) != len(labels):
        raise PacaError(
            f"choices is {choices!r}; expected an object with the lists text and label, equally long, or a list of "
            "objects with text and label."
        )
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise PacaError(f"two of the choices have the label {repeated!r}; expected one of its own for each.")
    if row["answerKey"] not in labels:
        error = NothingToLearn if row["answerKey"] in (None, "") else PacaError
        raise error(f"answerKey is {row['answerKey']!r}; expected one of the labels {', '.join(labels)}.")
    return _asked(question, labels, texts, row["answerKey"])


def _asked(question: object, labels: list[str], options: list[str], answer: str) -> Row:
    """As a row of question and answer: the options listed below the question, the label of the right one, and all."""
    if not isinstance(question, str):
        error = NothingToLearn if question is None else PacaError
        raise error(f"question is {question!r}; expected text.")
    listed = (f"{label}. {option}" for label, option in zip(labels, options, strict=True))
    return {"question": "\n".join([question.strip(), *listed]), "answer": answer, OPTIONS: labels}


def _as_list(options: object) -> object:
    """The list that a text writes, in JSON or as Python does: CSV has only texts; anything else as it is."""
    if isinstance(options, str) and options.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, RecursionError, SyntaxError, MemoryError):
                return read(options)
    return options


def _is_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _letters(count: int) -> list[str]:
    if not 2 <= count <= len(string.ascii_uppercase):
        raise PacaError(f"there are {count} choices; expected 2 to {len(string.ascii_uppercase)}.")
    return list(string.ascii_uppercase[:count])

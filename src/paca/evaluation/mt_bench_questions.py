"""The questions of MT-Bench, in FastChat's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paca.data.evenly import even_places
from paca.data.rows import rows_of
from paca.messages.errors import PacaError


@dataclass(frozen=True)
class Question:
    """A question of two turns."""

    id: int | str
    category: str
    turns: list[str]
    references: list[str]
    """Right answers for the judge to compare with, where the file brings them."""


def read_questions(file: Path, limit: int | None = None) -> list[Question]:
    """Read questions: `question_id`, `category`, `turns`, and `reference` where there is one.

    Args:
        file: FastChat's `question.jsonl`, or one of that form.
        limit: Use only so many, spread evenly: the file is sorted by category.

    Raises:
        PacaError: No such file, or a line that is no such question.
    """
    if not file.is_file():
        raise PacaError(f"There is no file of questions {file}. Give FastChat's question.jsonl of MT-Bench.")
    questions = []
    for place, row in rows_of(file):
        turns, references = row.get("turns"), row.get("reference") or []
        if "question_id" not in row or "category" not in row:
            raise PacaError(f"{place}: expected question_id, category and turns; found: {', '.join(row)}.")
        if type(row["question_id"]) not in (int, str) or not isinstance(row["category"], str):
            raise PacaError(f"{place}: question_id must be a number or a text, and category a text.")
        for name, texts in (("turns", turns), ("reference", references)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise PacaError(f"{place}: {name} is {texts!r}; expected a list of texts.")
        if not turns:
            raise PacaError(f"{place}: turns is empty; expected what the user says, turn by turn.")
        questions.append(Question(row["question_id"], row["category"], turns, references))
    if not questions:
        raise PacaError(f"{file} holds no questions.")
    return [questions[place] for place in even_places(len(questions), limit)]

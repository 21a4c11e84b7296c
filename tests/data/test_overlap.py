"""Held-out examples that are trained on as well are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paca.data.examples import load_examples
from paca.data.overlap import shared

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(6)]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("held_out", "count"), [(ROWS[4:], 2), ([{"question": "What is 4?", "answer": "5"}], 0)])
def test_the_same_words_count_wherever_they_stand(tmp_path: Path, held_out: list[dict[str, str]], count: int) -> None:
    train = load_examples(write(tmp_path / "train.jsonl", ROWS))
    other = load_examples(write(tmp_path / "test.jsonl", [*held_out, {"question": "New?", "answer": "Yes"}]))
    assert shared(train.dataset, other.dataset) == count

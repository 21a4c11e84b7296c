"""Held-out examples that are trained on as well are counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paca.data import load_examples
from paca.data.images import load_images
from paca.data.overlap import shared

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(6)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("held_out", "count"), [(ROWS[4:], 2), ([{"question": "What is 4?", "answer": "5"}], 0)])
def test_the_same_words_count_wherever_they_stand(tmp_path: Path, held_out: list[dict[str, str]], count: int) -> None:
    train = load_examples(write(tmp_path / "train.jsonl", ROWS))
    other = load_examples(write(tmp_path / "test.jsonl", [*held_out, {"question": "New?", "answer": "Yes"}]))
    assert shared(train.dataset, other.dataset) == count


def test_options_that_one_side_lists_make_no_other_example(tmp_path: Path) -> None:
    with_options = [{**row, "options": [row["answer"], "none"]} for row in ROWS]
    train = load_examples(write(tmp_path / "train.jsonl", ROWS))
    held_out = load_examples(write(tmp_path / "test.jsonl", with_options))
    assert "options" in held_out.dataset.column_names
    assert shared(train.dataset, held_out.dataset) == len(ROWS)


def test_images_count_by_their_files(tmp_path: Path) -> None:
    for name in ("a/cat/1", "a/dog/2", "b/cat/3"):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)
    train = load_images(str(tmp_path / "a")).dataset
    assert shared(train, load_images(str(tmp_path / "a"), split="test").dataset) == 2
    assert shared(train, load_images(str(tmp_path / "b")).dataset) == 0

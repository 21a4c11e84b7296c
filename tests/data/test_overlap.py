"""Examples that are there more than once are counted: held-out ones that are trained on, and copies to train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paca.data import load_examples, overlap
from paca.data.images import load_images
from paca.data.overlap import shared, told_of_copies

ROWS = [{"question": f"What is {n}?", "answer": str(n)} for n in range(6)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("held_out", "count"), [(ROWS[4:], 2), ([{"question": "What is 4?", "answer": "5"}], 0)])
def test_the_same_words_count_wherever_they_stand(tmp_path: Path, held_out: list[dict[str, str]], count: int) -> None:
    train = load_examples(write(tmp_path / "train.jsonl", ROWS))
    other = load_examples(write(tmp_path / "test.jsonl", [*held_out, {"question": "New?", "answer": "Yes"}]))
    assert shared(train.dataset, other.dataset) == count


def test_copies_among_training_examples_are_told_where_they_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(rows: list[dict[str, str]]) -> str:
        return told_of_copies(load_examples(write(tmp_path / "train.jsonl", rows)).dataset)

    assert told([*ROWS, ROWS[0], ROWS[0]]) == "; 2 of them (25 %) are copies of earlier ones"
    assert told([*ROWS, {**ROWS[0], "answer": "another"}]) == ""
    many = [{"question": f"{n}?", "answer": "a"} for n in range(99)]
    assert told([*many, many[0]]) == ""
    monkeypatch.setattr(overlap, "SEARCHED", 4)
    assert told([ROWS[0], *ROWS, ROWS[0]]) == "; 1 of the first 4 (25 %) is a copy of earlier ones"


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

"""Rows of CSV: there and back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.row_maker import row
from paca.bench.rows import append_rows, read_rows, summarized
from paca.messages.errors import PacaError


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = [
        row(samples=(0.1, 1 / 3, 2147483648.0), note='with, commas "quotes"\nand a line'),
        row(method="lora", samples=(), status="unavailable", versions='{"torch": "2.13"}'),
    ]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    back = read_rows(path)
    assert back[1] == rows[1]
    assert back[0].samples == pytest.approx(rows[0].samples, rel=1e-9)
    assert back[0].samples[2] == 2147483648.0
    assert replace(back[0], samples=(), **_summary(())) == replace(rows[0], samples=(), **_summary(()))
    assert path.read_text(encoding="utf-8").count("run,date,commit") == 1


def _summary(samples: tuple[float, ...]) -> dict[str, None]:
    return dict.fromkeys(("median", "q1", "q3", "minimum", "maximum"))


def test_ratios_are_taken_round_by_round() -> None:
    found = summarized([2.0, 2.0, 30.0], [1.0, 2.0, 10.0])
    assert found["ratio"] == 2.0
    assert found["median"] == 2.0
    assert "ratio" not in summarized([2.0], [1.0, 2.0])
    assert "ratio" not in summarized([2.0], [0.0])


def test_other_files_and_broken_numbers_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for action in (lambda: append_rows(other, [row()]), lambda: read_rows(other)):
        with pytest.raises(PacaError, match="columns"):
            action()
    assert other.read_text() == "a,b\n1,2\n"
    with pytest.raises(PacaError, match="no file"):
        read_rows(tmp_path / "missing.csv")
    path = tmp_path / "rows.csv"
    append_rows(path, [row(batch=77)])
    path.write_text(path.read_text().replace(",77,", ",many,"))
    with pytest.raises(PacaError, match="line 2"):
        read_rows(path)

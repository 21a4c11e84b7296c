"""Rows of CSV: there and back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.row_maker import row
from paca.bench.rows import COLUMNS, append_rows, read_rows, summarized
from paca.messages.errors import PacaError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = [
        row(samples=(0.1, 1 / 3, 2147483648.0), note='with, commas "quotes"\nand a line', commit="123", dirty=""),
        row(method="lora", samples=(), status="unavailable", versions='{"torch": "2.13"}', note="NA"),
    ]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    back = read_rows(path)
    assert list(back) == list(COLUMNS)
    assert len(back) == 2
    for written, (_, read) in zip(rows, back.iterrows(), strict=True):
        for name, value in written.items():
            assert read[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, (float, tuple)) else value)
    assert back["samples"][0][2] == 2147483648.0
    assert back["samples"][1] == ()
    assert back["median"].isna().tolist() == [False, True]
    assert path.read_text(encoding="utf-8").count("run,date,commit") == 1


OTHERS = ("selection.csv", "plan_on.csv", "plan_on_h100.csv", "plan_on_simulated.csv")  # rows of their own forms


@pytest.mark.parametrize("name", [path.name for path in BENCHMARKS.glob("*.csv") if path.name not in OTHERS])
def test_the_rows_of_the_project_can_be_read(name: str) -> None:
    rows = read_rows(BENCHMARKS / name)
    measured = rows[rows["status"] == "ok"]
    assert len(measured)
    assert (measured["samples"].map(len) > 0).all()
    again = [summarized(samples, None)["median"] for samples in measured["samples"]]
    assert measured["median"].tolist() == pytest.approx(again, rel=1e-6)  # of the digits that a file has


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
    append_rows(path, [row(), row(batch=77)])
    path.write_text(path.read_text().replace(",77,", ",many,"))
    with pytest.raises(PacaError, match=r"can't be read: .*'many'"):
        read_rows(path)
    with pytest.raises(ValueError, match="strange"):
        append_rows(path, [row(strange=1)])

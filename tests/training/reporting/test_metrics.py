from __future__ import annotations

import json
from pathlib import Path

from paca.training.reporting.metrics import MetricsLog, read_rows


def filled(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    log.append({"step": 0, "eval_loss": 3.0})
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 3.0 - step / 10})
    log.append({"step": 3, "eval_loss": 2.5})
    return log


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    log = filled(tmp_path / "m.jsonl")
    assert read_rows(log.path) == log.rows
    assert MetricsLog(log.path).rows == log.rows
    assert log.last_training_row() == {"step": 3, "loss": 2.7}
    assert (log.eval_metric_at(0, "loss"), log.eval_metric_at(1, "loss"), log.eval_metric_at(3, "loss")) == (
        3.0,
        None,
        2.5,
    )


def test_rewinding_drops_what_comes_after_a_step(tmp_path: Path) -> None:
    log = filled(tmp_path / "m.jsonl")
    log.rewind(2)
    assert [row["step"] for row in log.rows] == [0, 1, 2]
    log.append({"step": 3, "loss": 1.0})
    assert [row["step"] for row in read_rows(log.path)] == [0, 1, 2, 3]


def test_an_evaluation_made_again_replaces_the_first(tmp_path: Path) -> None:
    log = filled(tmp_path / "m.jsonl")
    log.append({"step": 3, "eval_loss": 2.4})
    assert [row for row in read_rows(log.path) if "eval_loss" in row] == [
        {"step": 0, "eval_loss": 3.0},
        {"step": 3, "eval_loss": 2.4},
    ]
    assert len(read_rows(log.path)) == 5


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    log = filled(tmp_path / "m.jsonl")
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    reopened = MetricsLog(log.path)
    assert [row["step"] for row in reopened.rows] == [0, 1, 2, 3, 3]
    reopened.rewind(3)
    assert len(log.path.read_text().splitlines()) == 5


def test_numbers_that_are_not_finite_are_stored_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "tokens": 5})
    line = log.path.read_text()
    assert json.loads(line, parse_constant=lambda name: f"not JSON: {name}") == {
        "step": 1, "loss": None, "grad_norm": None, "tokens": 5,
    }  # fmt: skip

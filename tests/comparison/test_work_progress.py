"""How far a comparison is, and how long it will take."""

from __future__ import annotations

import io
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from comparison.small_comparison import small_work
from paca.comparison.schedule import Job
from paca.comparison.time_left import seconds_left
from paca.comparison.work import _Progress


def test_time_left_goes_by_the_runs_of_each_method() -> None:
    left = {"paca": 2, "lora": 1}
    assert seconds_left(left, {}, "paca", 5.0, None) is None
    assert seconds_left(left, {}, "paca", 5.0, 20.0) == 2 * 20 + 20 - 5
    assert seconds_left(left, {"paca": [10.0, 30.0], "lora": [100.0]}, "paca", 5.0, 1.0) == 2 * 20 + 100 - 5
    assert seconds_left({"paca": 1}, {"paca": [10.0]}, "paca", 50.0, None) == 0


def test_a_log_file_has_the_time_left_at_each_run_but_the_first(tmp_path: Path) -> None:
    """Runs that take less than a minute had no line that tells it."""
    work = small_work(tmp_path, "paca")
    work.console = Console(file=io.StringIO(), width=200)
    work.run()
    lines = work.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    started = [line for line in lines if line.startswith("run ")]
    assert started[0] == "run 1 of 3: paca-lr0.001-seed0 ..."
    assert [re.sub(r"about [\d:.hms ]+ left", "LEFT", line) for line in started[1:]] == [
        "run 2 of 3: paca-lr0.003-seed0  LEFT ...",
        "run 3 of 3: paca-lr0.003-seed1  LEFT ...",
    ]


def test_runs_and_time_are_at_least_so_many_while_a_grid_may_grow(tmp_path: Path) -> None:
    work = small_work(tmp_path, "paca", extend=True)
    work.console = Console(file=io.StringIO(), width=200)
    work.run()
    lines = work.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    started = [re.sub(r"[\d:.hms]+ left", "LEFT", line) for line in lines if line.startswith("run ")]
    assert started[0] == "run 1 of at least 3: paca-lr0.001-seed0 ..."
    assert started[1] == "run 2 of at least 3: paca-lr0.003-seed0  at least LEFT ..."
    assert "  at least LEFT" in started[-2]
    assert started[-2].startswith(f"run {len(started) - 1} of at least {len(started)}: ")
    assert re.match(rf"run {len(started)} of {len(started)}: .*  about LEFT ...", started[-1])


def test_a_log_file_says_no_line_twice_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca.comparison.work._PLAIN_LINE_EVERY", 0)
    work, job = small_work(tmp_path), Job("paca", 1e-3, 0)
    shown = work.console = Console(file=io.StringIO())  # type: ignore[assignment]
    work.steps = {}  # so that no time left is told, which passes
    steps = iter([None, None, (2, 1.0), (6, 3.0), (6, 3.0), (6, 3.0)])
    with _Progress(work, job, Mock(step=lambda: next(steps))) as progress:
        for _ in range(6):
            progress.show()
    heading = "run 1 of 6: paca-lr0.001-seed0"
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [f"{heading} ...", f"{heading}  step 2", f"{heading}  step 6"]


def test_scores_before_and_after_training_are_in_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose scores took as long as its steps was told to end as its last third began."""
    clock = iter([1000.0, 1070.0])  # the first step was logged 10 seconds in, after a minute of scores
    monkeypatch.setattr("paca.comparison.work.time.monotonic", lambda: next(clock))
    work, job = small_work(tmp_path, "paca"), Job("paca", 1e-3, 0)
    work.console = Console(file=io.StringIO(), width=200, force_terminal=False)
    work.steps = {"paca": 6}
    progress = _Progress(work, job, Mock(step=lambda: (1, 10.0)))
    progress.left = {"paca": 1}
    assert progress._line(1070.0).endswith("step 1/6  about 1:50 left")  # 50 s of steps, and a minute of scores

"""How far a model's answers are, in a terminal and in a log file."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from paca.cli import counted
from paca.cli.counted import Counted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for a test to set."""
    now = [100.0]
    monkeypatch.setattr(counted, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def shown(console: Console, clock: list[float], seconds_of_batch: float) -> list[str]:
    """Of six answers, which come two at a time."""
    with Counted(console) as progress:
        progress.begin("base", "answers written", 6, 2)
        for _ in range(3):
            clock[0] += seconds_of_batch
            for _ in range(2):
                progress.advance()
        console.print("after")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_file_gets_a_line_now_and_then_until_all_are_there(clock: list[float]) -> None:
    ends = ["base: 0 of 6 answers written", "base: 6 of 6 answers written, in 0:45"]
    assert shown(Console(file=io.StringIO()), clock, 15) == [*ends, "after"]


def test_a_log_file_is_told_the_time_left_when_a_whole_batch_is_there(clock: list[float]) -> None:
    assert shown(Console(file=io.StringIO(), width=100), clock, 70) == [
        "base: 0 of 6 answers written",
        "base: 2 of 6 answers written, 2:20 left",
        "base: 4 of 6 answers written, 1:10 left",
        "base: 6 of 6 answers written, in 3:30",
        "after",
    ]


def test_a_terminal_gets_a_count_and_the_time_left_and_it_ends_by_itself(clock: list[float]) -> None:
    """However long a batch takes: rich's own time left never came where that was more than half a minute."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Counted(console) as progress:
        progress.begin("base", "answers written", 3)
        clock[0] += 70
        progress.advance()
        assert progress._progress is not None
        assert progress._progress.tasks[0].fields["time"] == "2:20 left"
        progress.advance()
        progress.advance()
        console.print("after")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert "base: answers written" in lines[0]
    assert "3/3" in "".join(lines)
    assert "in 1:10" in "".join(lines)
    assert lines[-1].endswith("after")

"""How far a model's answers are, in a terminal and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paca.cli import counted
from paca.cli.counted import Counted


def shown(console: Console) -> list[str]:
    with Counted(console) as progress:
        progress.begin("base", "answers written", 3)
        for _ in range(3):
            progress.advance()
        console.print("after")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_file_gets_a_line_now_and_then_until_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ["base: 0 of 3 answers written", "base: 3 of 3 answers written"]
    assert shown(Console(file=io.StringIO())) == [*ends, "after"]
    monkeypatch.setattr(counted, "_SECONDS_BETWEEN_LINES", -1)
    counts = [f"base: {done} of 3 answers written" for done in range(4)]
    assert shown(Console(file=io.StringIO())) == [*counts, "after"]


def test_a_terminal_gets_a_count_which_ends_by_itself() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    lines = shown(console)
    assert "base: answers written" in lines[0]
    assert "3/3" in "".join(lines)
    assert lines[-1].endswith("after")

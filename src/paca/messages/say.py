"""Lines for people on a console, as they are: rich reads no markup in them, colours no numbers and breaks no paths."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from paca.messages.shown import printable


def console_for_tables(**options: Any) -> Console:
    """A console whose tables have room in a log file: rich gives them 80 columns, or what `$COLUMNS` says, which is the
    terminal's of a process above."""
    console = Console(**options)
    if not console.is_terminal:
        console.width = 200
    return console


def say(console: Console, line: str, style: str | None = None, end: str = "\n") -> None:
    """Print `line`, in the colour `style` if given; what a terminal would obey is shown as it is written."""
    console.print(printable(line, longest=10_000), style=style, end=end, highlight=False, markup=False, soft_wrap=True)


def put(line: str) -> None:
    """Print `line` on standard output; what a terminal would obey is shown as it is written."""
    print(printable(line))

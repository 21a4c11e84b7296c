"""Lines for people on a console, as they are: rich reads no markup in them, colours no numbers and breaks no paths."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, line: str, style: str | None = None, end: str = "\n") -> None:
    """Print `line`, in the colour `style` if given."""
    console.print(line, style=style, end=end, highlight=False, markup=False, soft_wrap=True)

"""What a terminal shows while libraries are imported, which takes seconds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from paca_command import import_package


def loading_libraries() -> AbstractContextManager[object]:
    """A line on standard error for as long as the block runs, if that is a terminal."""
    console = Console(stderr=True)
    return console.status("Loading libraries ...") if console.is_terminal else nullcontext()


def import_libraries() -> None:
    """`import_package`, with that line."""
    with loading_libraries():
        import_package()

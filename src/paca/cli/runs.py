"""`paca runs`: the curves of runs on one local page, where two of them answer side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paca.cli.starting import import_libraries
from paca.messages.say import say


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with runs, or one run.")] = Path("runs"),
    port: Annotated[
        int | None, typer.Option(help="Port of the page.", show_default="the first free one from 7860")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Open a local page with the curves of all runs, also of running ones. Two of them can answer side by side."""
    from paca.training.folder.found_runs import runs_to_show

    runs_to_show(folder)  # before torch is imported: a wrong path is no reason to wait
    import_libraries()
    from paca.training.reporting.runs_page import show_runs

    console = Console()
    show_runs(folder, port=port, say=lambda line: say(console, line), browser=browser)

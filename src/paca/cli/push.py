"""`paca push`: put a finished run on the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from paca.messages.say import say
from paca.messages.units import format_bytes


def push(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="The folder of a run, an adapter or a model.")],
    to: Annotated[str, typer.Option(metavar="OWNER/NAME", help="The repository. A new one is private.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public. One that exists stays as it is.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The base model's id on the hub.", show_default="where the adapter says")
    ] = None,
) -> None:
    """Put a run's adapter or model on the Hugging Face hub, with its card."""
    from huggingface_hub.utils import disable_progress_bars

    from paca.pretrained.upload import upload

    console = Console()
    if not console.is_terminal:
        disable_progress_bars()
    done = upload(path, to, public=public, base_model=base_model)
    say(console, f"On the hub: {done.url} ({len(done.files)} files, {format_bytes(done.bytes)})")
    if done.local_base is not None:
        say(
            console,
            f"Warning: the adapter names {done.local_base} as its base model, which only this machine has. If it is on "
            "the hub, push again with --base-model OWNER/NAME.",
            style="yellow",
        )

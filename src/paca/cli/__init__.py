"""The command line: each of train, runs, compare, evaluate, chat, merge, export, import, push, bench, plan is one."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from safetensors import SafetensorError

from paca.cli.bench import bench
from paca.cli.chat import chat
from paca.cli.compare import compare
from paca.cli.evaluate import evaluate
from paca.cli.export import export
from paca.cli.import_adapter import import_adapter
from paca.cli.merge import merge
from paca.cli.plan import plan
from paca.cli.push import push
from paca.cli.runs import runs
from paca.cli.starting import hide_library_notes, let_waiting_threads_sleep, send_no_telemetry, show_escapes
from paca.cli.switches import Command, Group
from paca.cli.train import train
from paca.messages.disk import disk_error, working_folder_gone
from paca.messages.errors import PacaError
from paca.messages.say import say

app = typer.Typer(
    name="paca",
    cls=Group,
    help="Partial Connection Adaptation: fine-tune large models by training a few columns of each weight in place.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, compare, evaluate, chat, merge, export, push, runs, plan):
    app.command(cls=Command)(command)
app.command("import", cls=Command)(import_adapter)
app.add_typer(bench, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"paca {version('paca-tuning')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and stop.")
    ] = False,
) -> None:
    """Options before the subcommand."""


def main() -> None:
    """The program `paca`: what the user got wrong becomes one message on standard error and exit status 1.

    With the environment variable `PACA_DEBUG=1` the traceback is shown instead.
    """
    let_waiting_threads_sleep()
    send_no_telemetry()
    hide_library_notes()
    show_escapes()
    try:
        gone = working_folder_gone()
        if gone is not None:
            raise gone
        app(prog_name="paca")  # however it was started
    except PacaError as error:
        if os.environ.get("PACA_DEBUG") == "1":
            raise
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        from paca.pretrained.out_of_memory import is_out_of_memory

        if os.environ.get("PACA_DEBUG") == "1" or not is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        _fail(
            f"Memory ran out ({reason.rstrip('.')}). Free some; where a GPU is too small, let the command run on the "
            "CPU: CUDA_VISIBLE_DEVICES= paca ..."
        )
    except (OSError, SafetensorError) as error:
        told = disk_error(error)
        if os.environ.get("PACA_DEBUG") == "1" or (told is None and isinstance(error, OSError)):
            raise
        _fail(
            str(told)
            if told is not None
            else f"A weights file (.safetensors) is damaged or cut short: {error}. Fetch or save it again."
        )


def _fail(message: str) -> NoReturn:
    say(Console(stderr=True), f"Error: {message}", style="red")
    sys.exit(1)

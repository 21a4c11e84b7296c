"""How the program starts: what it sets before a library is imported, and what a terminal shows while they are, which
takes seconds."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from paca.messages.import_notes import NOTING
from paca.messages.shown import printable

ON_A_FREE_MACHINE, ON_A_BUSY_ONE = "50000", "10000"


@contextlib.contextmanager
def loading_libraries() -> Iterator[None]:
    """A line on standard error for as long as the block runs, if that is a terminal.

    Garbage is not looked for in it, nor ever in what its imports leave in memory: there is hardly any, and Python's
    collector walks through all of it time and again. `paca merge` of a tiny model took 7.7 CPU seconds with that, 4.6
    without.
    """
    console, collecting, known = Console(stderr=True), gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with console.status("Loading libraries ...") if console.is_terminal else nullcontext():
            yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if collecting:
            gc.enable()


def import_libraries() -> None:
    """Make `paca` the full package, with PaCA registered with PEFT; with that line. Does nothing where it is that
    already (`src/paca_command.py` says why it need not be)."""
    package = sys.modules["paca"]
    if not hasattr(package, "__all__"):
        assert package.__spec__ is not None
        assert package.__spec__.loader is not None
        with loading_libraries():
            package.__spec__.loader.exec_module(package)


def hide_library_notes() -> None:
    """Hide warnings about the next releases of libraries; nothing a user of a command can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in NOTING:
        logging.getLogger(name).setLevel(logging.ERROR)


def send_no_telemetry() -> None:
    """Let no library tell its makers what is run (TRL does, for each trainer it makes), unless the user said so by
    `HF_HUB_DISABLE_TELEMETRY=0`. Before huggingface_hub is imported, which reads that once; processes inherit it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def show_escapes() -> None:
    """Let libraries' notes and warnings show what a terminal would obey: they quote names from files of others."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning
    ours = Path(__file__).parents[1]

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        with contextlib.suppress(TypeError, ValueError):  # a message that does not fit its arguments
            made.msg, made.args = printable(made.getMessage()), ()
        return made

    def line(message: Warning | str, category: type[Warning], filename: str, *args: Any, **options: Any) -> str:
        if category is UserWarning and Path(filename).is_relative_to(ours):  # where it stands in here helps nobody
            return printable(f"Warning: {message}\n")
        return printable(write(message, category, filename, *args, **options))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = line


def let_waiting_threads_sleep() -> None:
    """Make a thread of torch that waits for another spin only for a moment, unless the user has said how it shall wait:
    in the environment, which OpenMP reads when torch is imported.

    By default it spins so long that on a machine with other work it takes the core from the thread it waits for. Where
    cores are free, spinning longer bridges the Python between two products. Measured on 2 cores with the default, with
    50,000, with 10,000 and with OMP_WAIT_POLICY=PASSIVE (10 blocks of SmolLM2's shape, 4 x 140 tokens, bfloat16): a
    training step of 598, 576, 590 and 703 ms on a free machine; at a load of 7, 10 steps did not end within 40 s with
    the default, and took 1.2 s each with 10,000 (docs/notes/demo-tuning.md, with more counts).
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = ON_A_FREE_MACHINE if _is_free() else ON_A_BUSY_ONE


def _is_free() -> bool:
    """Whether less than half of the cores had work within the last minute, as far as the system says."""
    try:
        return os.getloadavg()[0] < (os.cpu_count() or 1) / 2
    except (AttributeError, OSError):  # not on Windows
        return False

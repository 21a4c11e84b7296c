"""What no command shows, or sends: notes from one library to another, and to its makers."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

from paca.messages.import_notes import NOTING
from paca.messages.shown import printable


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

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        with contextlib.suppress(TypeError, ValueError):  # a message that does not fit its arguments
            made.msg, made.args = printable(made.getMessage()), ()
        return made

    def line(*args: Any, **options: Any) -> str:
        return printable(write(*args, **options))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = line

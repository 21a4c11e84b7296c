"""Runs `paca` as a process: started from nothing, or forked from one that has the libraries in memory, 5 s sooner.

Tests of `train`, `evaluate` and of `chat` in a terminal start it from nothing: only that shows what libraries print
while they are imported. The other commands import nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from forked_process import run_forked, start_forked

MAIN = """
import sys
from paca_command import main
try:
    main()
except SystemExit as end:
    # Whatever imports paca during a command's work gets all of it.
    assert end.code or "peft" not in sys.modules or hasattr(sys.modules["paca"], "PacaConfig")
    raise
"""
PACA = (sys.executable, "-c", MAIN)


def forked_paca(*arguments: object, typed: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end; `typed` is what standard input holds."""
    return run_forked(MAIN, *arguments, typed=typed, cwd=cwd)


def start_paca(*arguments: object, streams: Path, cwd: Path | None = None) -> BaseProcess:
    """Fork and leave it running; its `stdout` and `stderr` are files of the folder `streams`."""
    return start_forked(MAIN, *arguments, streams=streams, cwd=cwd)


def fresh_paca(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Start from nothing, and run to the end."""
    command = [*PACA, *map(str, arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            process.wait(300)
        finally:
            with contextlib.suppress(ProcessLookupError):  # or of what it left behind
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output.read().decode(), errors.read().decode())

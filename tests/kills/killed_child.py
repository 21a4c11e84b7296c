"""A forked child that is killed at a chosen point, without a word: nothing of its own clean-up runs.

Three kinds of points. `call`: SIGKILL before the n-th call that opens, renames, makes or removes a file below a folder.
`byte`: in the middle of writing a file that grows beyond n bytes, whatever library writes it (by the kernel's SIGXFSZ,
which ends a process just as SIGKILL does, and leaves the file at n bytes). `time`: SIGKILL from outside, after a while.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

_CALLS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


class Point(NamedTuple):
    """Where a child is killed."""

    kind: Literal["call", "byte", "time"]
    number: float
    """Calls, bytes or seconds."""


class Ended(NamedTuple):
    """How a child ended."""

    killed: bool
    calls: int
    """Counted, if it ended by itself."""
    seconds: float


def run_and_kill(work: Callable[[], Any], below: Path, point: Point | None, log: Path) -> Ended:
    """Run `work` in a fork of this process, and kill it at `point`.

    Args:
        work: What the child does.
        below: The folder whose files count for `call`.
        point: None lets it end by itself.
        log: Gets what the child prints.

    Raises:
        RuntimeError: It failed by itself.
    """
    counted, tell = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(work, below, point, log, tell)
    os.close(tell)
    if point is not None and point.kind == "time":
        time.sleep(point.number)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    calls = os.read(counted, 32)
    os.close(counted)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
    if not killed and status != 0:
        raise RuntimeError(f"The child failed at {point}:\n{log.read_text(errors='replace')}")
    return Ended(killed, int(calls or 0), time.monotonic() - started)


def _be_the_child(work: Callable[[], Any], below: Path, point: Point | None, log: Path, tell: int) -> None:
    status = 1
    tqdm.set_lock(threading.RLock())  # its own is one of all processes: killed with it, the others would wait for ever
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        calls = _count_calls(str(below), point)
        if point is not None and point.kind == "byte":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(point.number), int(point.number)))
        work()
        os.write(tell, str(calls[0]).encode())
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count_calls(below: str, point: Point | None) -> list[int]:
    calls = [0]

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CALLS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if not os.fspath(arguments[0]).startswith(below):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        calls[0] += 1
        if point is not None and point.kind == "call" and calls[0] >= point.number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)
    return calls

"""Work that others' text may keep from ending, done in a process of its own, which can be ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

SECONDS = 1.0
"""Of processor time, for one request."""
_PATIENCE = 300.0 if hasattr(signal, "setitimer") else 10.0
"""Seconds on the clock, where the system counts those of the processor too: the machine may be busy."""
_BYTES = 2**29  # that the process may take for its work
_LONGEST = 2**24  # characters of an answer

_PROGRAM = """
import json, signal, sys
sys.path[:] = json.loads(sys.stdin.readline())
{program}
try:
    import resource
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + {bytes}
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):  # of other systems than Linux
    pass
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, request["seconds"])
    try:
        answer = dict(result=work(request["work"]))
    except Exception as error:
        answer = dict(error=type(error).__name__ + ": " + str(error)[:500])
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    text = json.dumps(answer)
    print(text if len(text) < {longest} else json.dumps(dict(error="The result is too long.")), flush=True)
"""


class TookTooLong(Exception):
    """The work did not end within its bounds of time and memory."""


class WorkFailed(Exception):
    """The work raised an error; its text is in the message."""


class BoundedProcess:
    """A Python process that answers requests one by one; one that does not end in time is killed, and the next starts
    another. `program` is Python source that defines `work(request)`; requests and results are JSON. The bound on time
    is for `work` alone, that on memory for all."""

    def __init__(self, program: str) -> None:
        self._program = _PROGRAM.format(program=program, bytes=_BYTES, longest=_LONGEST)
        self._process: Any = None  # a `subprocess.Popen`
        self._owner, self._ready = os.getpid(), False
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:
                pass  # leaving it closes the pipes, and waits

    def start(self) -> None:
        """Start the process, and don't wait until it is ready. Raise `OSError` if that can't be done."""
        with self._lock:
            self._start()

    def ask(self, work: Any, seconds: float | None = None) -> Any:
        """The result of `work(request)`, which may take `seconds` of processor time.

        Raises:
            TookTooLong: It did not end, or took too much memory.
            WorkFailed: It raised an error.
            OSError: No process could be started.
        """
        seconds = SECONDS if seconds is None else seconds
        with self._lock:
            self._start()
            if not self._ready:
                if self._answer(300) != "ready":
                    raise OSError(f"{sys.executable} does not run as Python in a process of its own")
                self._ready = True
            answer = self._answer(_PATIENCE, json.dumps({"work": work, "seconds": seconds}))
        if answer is None or answer.get("error", "").startswith("MemoryError"):
            raise TookTooLong
        if "error" in answer:
            raise WorkFailed(answer["error"])
        return answer["result"]

    def _start(self) -> None:
        if self._owner != os.getpid():  # forked: the process and its pipes are our parent's
            self._process, self._owner = None, os.getpid()
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        if getattr(sys, "frozen", False):  # it would start the program that we are in
            raise OSError("this program has no Python of its own to start")
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            cwd=os.path.dirname(os.path.abspath(sys.executable)),  # not a folder that others fill
            start_new_session=True,  # so that Ctrl-C is for us alone
        )
        here = os.getcwd()  # may be a stranger's folder
        places = [place for place in sys.path if os.path.isabs(place) and os.path.abspath(place) != here]
        with contextlib.suppress(OSError):  # of a process that is gone: its answer will say so
            self._process.stdin.write(json.dumps(places) + "\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float, line: str | None = None) -> Any:
        """The next line of the process, after `line` was written to it; None, and no process, if there is none."""
        process = self._process
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it ended while it was written to
            answer = ""
        except BaseException:  # Ctrl-C: its answer would be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()
        if not answer:
            self.close()
            return None
        return json.loads(answer)

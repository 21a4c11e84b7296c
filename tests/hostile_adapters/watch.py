"""What no adapter may do, noticed while it is loaded: write elsewhere, ask the network, start a program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STARTED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")


class _Watch:
    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None  # None: not watching
        self.seen: list[str] = []
        self.asked: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            self.asked.append(f"{event} {arguments[-1]!r}" if event != "socket.getaddrinfo" else str(arguments[0]))
            raise OSError("no network here")
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(path, str):
                self._changed(event, path)
        elif event in _CHANGES and isinstance(arguments[0], (str, os.PathLike)):
            for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                self._changed(event, os.fspath(path))
        elif event in _STARTED and not (event == "subprocess.Popen" and arguments[0] == sys.executable):
            self.seen.append(f"{event} {arguments[0]!r}")

    def _changed(self, event: str, path: str) -> None:
        if not os.path.isabs(path):  # below an open folder, as `shutil.rmtree` does; the listing shows what is gone
            return
        if not os.path.abspath(path).startswith((*(self.allowed or ()), "/dev/null")):
            self.seen.append(f"{event} {path}")


_WATCH = _Watch()
_added: list[bool] = []


@contextmanager
def watching(*allowed: Path) -> Iterator[_Watch]:
    """Note what is written below other folders than `allowed`, and refuse the network meanwhile.

    Files that are written by other languages than Python are not seen here.
    """
    if not _added:
        sys.addaudithook(_WATCH)  # which can't be taken away again
        _added.append(True)
    _WATCH.seen, _WATCH.asked = [], []
    _WATCH.allowed, writes_none = tuple(map(str, allowed)), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # what is imported for the first time would be kept compiled beside its source
    try:
        yield _WATCH
    finally:
        sys.dont_write_bytecode = writes_none
        _WATCH.allowed = None

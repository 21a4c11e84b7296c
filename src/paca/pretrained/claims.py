"""Which process uses a folder: whoever holds the claim on it, and who that is in words."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a claim is always free
    fcntl = None  # type: ignore[assignment]


_HELD: set[Claim] = set()
"""Those of this process."""


class Claim:
    """A lock on a file, held by this process and by those that it hands its descriptor to.

    It is the kernel's (`flock`), on the open file: it is gone when the last of these processes has ended, however that
    came. So a claim is never stale, no process id is ever taken for another's, and a training that outlives a killed
    `paca compare` keeps its run until it is done. Forks, such as the workers of a `DataLoader`, don't hold it: they may
    outlive a killed training by seconds.
    """

    def __init__(self, path: Path) -> None:
        """Args:
        path: Of the lock file; it stays, with the last holder's process id and host in it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor: int | None = None

    def take(self, *, wait: bool = False, look_only: bool = False) -> bool:
        """Take the claim; with `wait`, once nobody else has it. Returns whether it is ours.

        With `look_only` the file keeps the last holder's name.
        """
        descriptor = self._locked(wait)
        if descriptor is None:
            return False
        if not look_only:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._descriptor = descriptor
        _HELD.add(self)
        return True

    def _locked(self, wait: bool) -> int | None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    return descriptor
                os.close(descriptor)
            except FileNotFoundError:  # its last holder removed the file meanwhile: this lock is on nothing
                os.close(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise

    @property
    def descriptor(self) -> int:
        """Of the open file; a process that inherits it holds the claim too."""
        assert self._descriptor is not None
        return self._descriptor

    def holder(self) -> str:
        """Who took it last, in words."""
        try:
            return self.path.read_text(encoding="utf-8") or "another process"
        except FileNotFoundError:
            return "another process"

    def in_place(self) -> bool:
        """Whether the file that is held still lies at its path, as nobody removed it or its folder."""
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Let go. A process that it was handed to, and that still runs, keeps it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _leave_to_parent() -> None:
    """In a fork: close the copies of the descriptors. The parent's stay locked, as nothing is unlocked."""
    for claim in list(_HELD):
        claim.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def holder_of(path: Path) -> str | None:
    """Who holds the claim of this lock file, in words; None if nobody does, or if it is somebody else's to know.

    Nothing is written: a run may lie where only its owner can.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return None

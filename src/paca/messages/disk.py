"""A file that can't be written: how that is recognised, whatever wrote it, and what the user is told."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from paca.messages.errors import PacaError
from paca.messages.units import format_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OTHER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ESTALE,
          errno.EIO, errno.ENXIO)  # fmt: skip
_WORDS = {
    errno.ENOSPC: ("no space left", "os error 28", "requested and", "disk full"),  # the third: numpy's tofile
    errno.EDQUOT: ("quota exceeded", "os error 122"),
    errno.EFBIG: ("file too large", "os error 27"),
    errno.EACCES: ("permission denied", "os error 13"),
    errno.EROFS: ("read-only file system", "os error 30"),
    errno.ENOENT: ("os error 2) at path", "parent directory"),
    errno.EIO: ("input/output error", "os error 5)", "unexpected pos", "iostream error", "pytorchstreamwriter"),
}
"""What libraries that have no errno say: torch, safetensors, tokenizers. torch's writer often gives no reason."""
_UNNAMED = "standard output, or a file that the error does not name,"
_NEXT_TO_NOTHING = 1 << 16  # bytes


class DiskError(PacaError):
    """A file could not be written. The text says which, why, and how much room is missing."""


@contextmanager
def writing(path: Path, needs: int = 0) -> Iterator[None]:
    """A block that writes the file or the folder `path`, of about `needs` bytes if that is known. Raise `DiskError`,
    which tells the user of that path, if it could not be written."""
    try:
        yield
    except PacaError:
        raise
    except Exception as error:
        told = disk_error(error, path, needs)
        if told is None:
            raise
        raise told from error


def working_folder_gone() -> DiskError | None:
    """What to tell the user where the folder that the program runs in was deleted; else None."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return DiskError("The working folder is gone: it was deleted. Change into a folder that exists, and try again.")
    return None


def disk_error(
    error: BaseException, path: Path | None = None, needs: int = 0, left: int | None = None
) -> DiskError | None:
    """What to tell the user of a write that failed; None if the error is about something else.

    Args:
        error: As it was raised, by whatever library.
        path: The file or the folder that was written, unless the error names a file. None where it is not known:
            that may be standard output.
        needs: Bytes that it takes, about; 0 where that is not known.
        left: Bytes that were free when it failed, if some have been made free since.
    """
    number, named = _reason(error)
    if number is None:
        return None
    path = path if named is None else named
    gone = working_folder_gone() if path is None or not path.is_absolute() else None
    if gone is not None:
        return gone
    if path is None:
        reason = _full(number) if number in _FULL else os.strerror(number)
        return DiskError(f"{reason}: {_UNNAMED} could not be opened or written.")
    folder = _nearest_folder(path)
    free = shutil.disk_usage(folder).free
    if number == errno.EIO and min(free, free if left is None else left) < max(needs, _NEXT_TO_NOTHING):
        number = errno.ENOSPC  # torch's writer does not say why
    if number in _FULL:
        return DiskError(f"{_full(number)}: {path} could not be written. {_missing(needs, free, folder)}")
    if number in (errno.ENOENT, errno.ESTALE):
        if named is not None and os.path.isdir(named.absolute().parent):  # there is room for it: it was to be read
            return None
        return DiskError(f"{path} could not be written: its folder is gone. Was it moved or deleted meanwhile?")
    reason = os.strerror(number)
    return DiskError(f"{path} could not be opened or written: {reason[:1].lower()}{reason[1:]}.")


def _reason(error: BaseException | None) -> tuple[int | None, Path | None]:
    """The errno that an error or one of its causes stands for, and the file that is named with it."""
    seen: list[BaseException] = []
    weak: tuple[int | None, Path | None] = (None, None)
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in (*_FULL, *_OTHER):
            named = error.filename if error.filename2 is None else error.filename2  # of a copy, where it goes
            return error.errno, Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else None
        if isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception:  # of tokenizers
            text = str(error).lower()
            for number, words in _WORDS.items():
                if any(word in text for word in words):
                    if number != errno.EIO:
                        return number, None
                    weak = number, None
        error = error.__cause__ or error.__context__
    return weak


def says_full(told: str) -> bool:
    """Whether the text of a `DiskError`, as another process may have left it, is of a full disk or a used up quota."""
    return told.startswith(tuple(map(_full, (errno.ENOSPC, errno.EDQUOT))))


def _full(number: int) -> str:
    return {errno.ENOSPC: "The disk is full", errno.EDQUOT: "Your disk quota is used up"}.get(
        number, "A limit on the size of files is reached"
    )


def _missing(needs: int, free: int, folder: Path) -> str:
    there = f"{format_bytes(free)} is free in {folder}"
    if not needs:
        return f"{there[0].upper()}{there[1:]}."
    if needs <= free:  # a quota, a limit, or somebody made room meanwhile
        return f"It takes about {format_bytes(needs)}; {there} now."
    return f"It takes about {format_bytes(needs)}, and {there}: {format_bytes(needs - free)} is missing."


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.isdir(folder))  # which raises nothing

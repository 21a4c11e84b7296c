"""Write a result beside its place and put it there whole, so that a failure leaves what was there."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from paca.messages.disk import writing
from paca.messages.errors import PacaError
from paca.pretrained.claims import Claim

_IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without hard links


@contextmanager
def whole_output(output: Path, needs: int = 0, *, overwrite: bool = True) -> Iterator[Path]:
    """A path to make a file or a folder at, which takes the place of `output` when the block ends without an error.

    What `output` held is deleted only once the new result stands in its place; after an error nothing has changed.
    What a killed process left beside `output` goes first.

    Args:
        output: The file or the folder; of a link, what it leads to.
        needs: Bytes that it takes, about, for the message when there is no room.
        overwrite: Whether something may be replaced; else what came there meanwhile stays, and the new result goes.

    Raises:
        PacaError: The folder can't be written to, there is no room, or something is in the way.
    """
    output = output.resolve() if output.is_symlink() else output
    beside = _beside(output)
    partial, replaced = output.with_name(f"{beside}.partial"), output.with_name(f"{beside}.replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_what_was_killed(output)
        partial.mkdir()
    except OSError as error:
        raise PacaError(f"{output.parent} cannot be written to: {error}. Give another output.") from error
    with Claim(partial / ".lock") as claim:
        try:
            with writing(output, needs):
                claim.take()
                yield partial / output.name
                let_others_read(partial / output.name)
                sync(partial / output.name)
                _put(partial / output.name, output, replaced, overwrite)
                sync_names(output.parent)
        finally:
            _clear(partial, replaced, output)


def _beside(path: Path) -> str:
    """A name that nobody else takes: the processes of two containers that share a disk may have the same numbers."""
    return f".{path.name}.{secrets.token_hex(8)}"


def _put(made: Path, output: Path, replaced: Path, overwrite: bool) -> None:
    """Rename `made` to `output`, while other processes may do the same."""
    for last in (False, False, False, True):
        try:
            if overwrite and output.is_dir():
                if replaced.is_dir():  # of the try before: another process's result has taken its place since
                    shutil.rmtree(replaced, ignore_errors=True)
                os.replace(output, replaced)
            if overwrite or made.is_dir():
                os.replace(made, output)
            else:
                _name(made, output)
            return
        except OSError as error:
            if not overwrite and error.errno in _IN_THE_WAY:
                raise PacaError(
                    f"{output} was not there when this began, and is now. It stays as it is; nothing was written. Give "
                    "another output, or --overwrite to replace it."
                ) from error
            if last or error.errno not in (*_IN_THE_WAY, errno.ENOENT):
                raise


def _name(made: Path, output: Path) -> None:
    """Give a file its name, which nobody may have taken meanwhile: a rename would replace that."""
    try:
        os.link(made, output)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if output.exists():
            raise FileExistsError(errno.EEXIST, "") from error
        os.replace(made, output)


def write_whole(path: Path, text: str) -> None:
    """Write a file in place of the one that is there, whole or not at all; make its folder if need be.

    Raises:
        DiskError: It could not be written.
    """
    beside = path.with_name(f"{_beside(path)}.partial")
    with writing(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a power cut might leave the new name with nothing in it
            os.replace(beside, path)
            sync_names(path.parent)
        finally:
            with suppress(OSError):  # of a folder that is gone
                beside.unlink(missing_ok=True)


def let_others_read(made: Path) -> None:
    """Give files that only their owner may read, as safetensors makes them, the mode that any new file gets here."""
    allowed = (made if made.is_dir() else made.parent).stat().st_mode & 0o666  # of a folder that was just made
    for part in (*(made.rglob("*") if made.is_dir() else ()), made):
        if not part.is_symlink() and part.is_file() and part.stat().st_mode & 0o777 == 0o600:
            part.chmod(0o600 | allowed)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk: also a power cut leaves it whole then."""
    for part in (*(path.rglob("*") if path.is_dir() else ()), path):
        if not part.is_symlink() and part.is_file():
            _sync_one(part)
        elif not part.is_symlink() and part.is_dir():
            sync_names(part)


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: after a power cut what was renamed into it is there. Call it
    before what the new name stands in for is removed."""
    with suppress(OSError):  # not every system can do this
        _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Let a folder, written whole, take the place of `folder`: at no moment is a part of either there."""
    let_others_read(unfinished)
    sync(unfinished)
    replaced = folder.with_name(f".{folder.name}.replaced.partial")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, replaced)
    os.replace(unfinished, folder)
    sync_names(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_what_was_killed(output: Path) -> None:
    """Remove what processes left that were killed while they wrote `output`; what one had replaced comes back."""
    for partial in output.parent.glob(f".{escape(output.name)}.*.partial"):
        with Claim(partial / ".lock") as claim:
            if not claim.take(look_only=True):  # it is still at work
                continue
            _clear(partial, partial.with_suffix(".replaced"), output)


def _clear(partial: Path, replaced: Path, output: Path) -> None:
    """Remove what was made beside `output`; what was replaced comes back if nothing has taken its place."""
    if replaced.is_dir() and not output.exists():  # stopped between the two renames
        os.replace(replaced, output)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)  # at last: the next call looks for it

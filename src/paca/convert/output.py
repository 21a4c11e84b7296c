"""Write a result beside its place and put it there whole, without destroying what is not its predecessor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paca.messages.errors import PacaError


def check_output_folder(
    output: Path, overwrite: bool, *, reads: Iterable[Path], job: str, holds: str, marker: str
) -> None:
    """Refuse an output folder that is in use, or whose replacement would delete something else than a predecessor.

    Args:
        output: the folder to be written, absolute.
        overwrite: whether it may replace an earlier result.
        reads: what the job reads; it may not lie within ``output``.
        job: what is being done, for messages: "merge".
        holds: what an earlier result would be, for messages: "a model".
        marker: the file by which an earlier result is known: "config.json".

    Raises:
        PacaError: it is refused.
    """
    _check_apart(output, reads, job, "folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise PacaError(f"The output {output} is a file. Give a folder that does not exist yet.")
    if not overwrite:
        raise PacaError(f"The output {output} exists and is not empty. Give another one, or --overwrite to replace it.")
    if not (output / marker).is_file():
        raise PacaError(f"The output {output} does not hold {holds} (no {marker}), so it is not overwritten.")


def check_output_file(output: Path, overwrite: bool, *, reads: Iterable[Path], job: str) -> None:
    """Refuse an output file that exists already (unless it may be replaced), or that is a folder.

    Raises:
        PacaError: it is refused.
    """
    _check_apart(output, reads, job, "file")
    if output.is_dir():
        raise PacaError(f"The output {output} is a folder. Give the name of the file to write.")
    if output.exists() and not overwrite:
        raise PacaError(f"The output {output} exists. Give another one, or --overwrite to replace it.")


def _check_apart(output: Path, reads: Iterable[Path], job: str, kind: str) -> None:
    for path in reads:
        if path.exists() and path.resolve().is_relative_to(output.resolve()):
            raise PacaError(f"The output {output} holds {path}, which the {job} reads. Give another output {kind}.")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``output`` when the block ends without an error.

    What ``output`` held is deleted only once the new folder stands in its place; after an error nothing has changed.

    Raises:
        PacaError: nothing can be written there.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    _make(partial)
    try:
        yield partial
        replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
        if output.exists():
            os.replace(output, replaced)
        os.replace(partial, output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A file name to write to; the file takes the place of ``output`` when the block ends without an error.

    Raises:
        PacaError: nothing can be written there.
    """
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    _make(folder)
    try:
        yield folder / output.name
        os.replace(folder / output.name, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise PacaError(f"{folder.parent} cannot be written to: {error}. Give another output.") from error

"""Write a result beside its place and put it there whole, so that a failure leaves what was there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paca.messages.errors import PacaError


@contextmanager
def whole_output(output: Path) -> Iterator[Path]:
    """A path to make a file or a folder at, which takes the place of `output` when the block ends without an error.

    What `output` held is deleted only once the new result stands in its place; after an error nothing has changed.
    """
    beside = f".{output.name}.{os.getpid()}"
    partial, replaced = output.with_name(f"{beside}.partial"), output.with_name(f"{beside}.replaced")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise PacaError(f"{output.parent} cannot be written to: {error}. Give another output.") from error
    try:
        yield partial / output.name
        if output.is_dir():
            os.replace(output, replaced)
        os.replace(partial / output.name, output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

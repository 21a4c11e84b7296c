"""Files of JSON lines that grow as results come, and are read again by the next run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paca.evaluation.sides import Watcher
from paca.messages.disk import writing
from paca.messages.errors import PacaError
from paca.pretrained.claims import Claim


def key_of(*parts: str) -> str:
    """A short name for what a line was made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line; DiskError if there is no room."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


class KeptAnswers:
    """What one side of an evaluation answered: told to a watcher as it comes, and kept in a file where there is one."""

    def __init__(self, side: str, watcher: Watcher, file: Path | None) -> None:
        self._side, self._watcher, self._file = side, watcher, file
        rows = [] if file is None else lines_of(file)
        self._kept = {row["key"]: row["answer"] for row in rows if isinstance(row.get("key"), str) and "answer" in row}

    def begin(self, what: str, asked: Sequence[Any], at_a_time: int = 1) -> dict[int, Any]:
        """The answers that are kept already, as JSON has them, by position in `asked`.

        Args:
            what: What the answers are, for people.
            asked: What is to be answered, as JSON can hold it.
            at_a_time: How many answers come together.
        """
        keys = [_key(what, one) for one in asked]
        found = {index: self._kept[key] for index, key in enumerate(keys) if key in self._kept}
        if missing := len(asked) - len(found):
            self._watcher.begin(self._side, what, missing, at_a_time)
        return found

    def add(self, what: str, asked: Any, answer: Any) -> None:
        """Keep one more."""
        if self._file is not None:
            append(self._file, {"key": _key(what, asked), "answer": answer})
        self._watcher.advance()


def _key(what: str, asked: Any) -> str:
    return key_of(what, json.dumps(asked))


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to; a last line that was cut short is left out, and taken away.

    Raises:
        PacaError: Another line is no row.
    """
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # before it is read as text: it may be cut within a character
    if whole != content:
        with writing(file):
            os.truncate(file, len(whole))  # nothing is written anew: a kill here must not cost what there is
    with as_written(file):
        rows = [json.loads(line) for line in whole.split(b"\n") if line]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
    return rows


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """A block that takes from the rows of a file what paca put there. Raises `PacaError` if that is not in them."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PacaError(f"{file} is damaged: {reason}. Remove it; what it held is asked again.") from error


@contextmanager
def alone_in(output: Path | None) -> Iterator[None]:
    """A block in which this process alone evaluates into a folder.

    Raises:
        PacaError: Another process does, or the folder can't be written to.
    """
    if output is None:
        yield
        return
    with writing(output):
        claim = Claim(output / ".evaluate.lock")
        free = claim.take()
    if not free:
        raise PacaError(f"{claim.holder()} evaluates into {output}. Wait for its end, or give another --output.")
    with claim:
        yield

"""The error that is meant for the person at the keyboard."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class PacaError(ValueError):
    """Something the user gave is wrong: a key, a file, a value.

    The text says what was wrong, what was expected and what to do. The command line prints it alone, without a
    traceback, and exits with status 1. It is a `ValueError`, so library callers need not know this class.
    """


class NothingToLearn(PacaError):
    """Nothing can be learned from a record of the training data: its answer is empty, or not there, say."""


@contextmanager
def about(setting: str) -> Iterator[None]:
    """A block whose `PacaError`s are about one setting, which their text then begins with."""
    try:
        yield
    except PacaError as error:
        raise PacaError(f"{setting}: {error}") from error


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_failure(error: BaseException) -> bool:
    """Whether this is an error of some code, not somebody's wish to stop: Rust's panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def within_peft(error: BaseException | None) -> bool:
    """Whether the code of a method of PEFT was running when `error` was raised."""
    frames = traceback.walk_tb(None if error is None else error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("peft.tuners.") for frame, _ in frames)

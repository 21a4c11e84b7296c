"""How many processes a launcher (`torchrun`, `accelerate launch`) has started."""

from __future__ import annotations

import os

from paca.messages.errors import PacaError

_COUNT = "the number of processes that a launcher started"
_VARIABLES = {
    "WORLD_SIZE": _COUNT,
    "LOCAL_WORLD_SIZE": _COUNT,
    **dict.fromkeys(("RANK", "LOCAL_RANK"), "a process's number"),
}


def launched_processes(variable: str = "WORLD_SIZE") -> int:
    """What the environment says: 1 if `variable` is not set, or empty. Raise `PacaError` if it is no such number."""
    text = os.environ.get(variable, "").strip() or "1"
    if not (_is_number(text) and int(text[:20]) > 0):
        raise _refused(variable, text)
    return int(text[:20])


def check_launchers_variables() -> None:
    """Take those that are empty out of the environment, as accelerate would read them as numbers. Raise `PacaError` if
    another one is none."""
    for variable in _VARIABLES:
        text = os.environ.get(variable, "0").strip()
        if not text:
            del os.environ[variable]
        elif not _is_number(text.removeprefix("-")):  # -1 stands for none
            raise _refused(variable, text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _refused(variable: str, text: str) -> PacaError:
    return PacaError(
        f"The environment variable {variable} is {text!r}, and has to be {_VARIABLES[variable]}. Unset it, or start "
        "with torchrun or accelerate launch."
    )

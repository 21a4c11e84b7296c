"""How many processes a launcher (`torchrun`, `accelerate launch`) has started."""

from __future__ import annotations

import os

from paca.messages.errors import PacaError


def launched_processes(variable: str = "WORLD_SIZE") -> int:
    """What the environment says: 1 if `variable` is not set, or empty. Raise `PacaError` if it is no such number."""
    text = os.environ.get(variable, "").strip() or "1"
    if not (text.isascii() and text.isdecimal() and int(text[:20]) > 0):
        raise PacaError(
            f"The environment variable {variable} is {text!r}, and has to be the number of processes that a launcher "
            "started. Unset it, or start with torchrun or accelerate launch."
        )
    return int(text[:20])


def forget_empty() -> None:
    """Take launchers' variables that are empty out of the environment: accelerate would read them as numbers."""
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(variable, "0").strip():
            del os.environ[variable]

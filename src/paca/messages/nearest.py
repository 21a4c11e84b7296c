"""The name that somebody who misspelt one most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name closest in spelling to `name`, or None where nothing is close.

    Args:
        name: As it was given.
        valid: What it could be.
        cutoff: How alike the two must be, from 0 (not at all) to 1 (the same).
    """
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, valid: Iterable[str], form: str = "{!r}") -> str:
    """`" Did you mean ...?"` for the end of a message, or nothing; `form` is how the name is shown: quoted."""
    close = nearest(name, valid)
    return f" Did you mean {form.format(close)}?" if close else ""

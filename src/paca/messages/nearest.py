"""The name that somebody who misspelt one most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name closest in spelling to `name`, or None if none is as alike as `cutoff`: 0 (not at all) to 1."""
    return next(iter(difflib.get_close_matches(name, list(valid), 1, cutoff)), None)


def did_you_mean(name: str, valid: Iterable[str], form: str = "{!r}", count: int = 1) -> str:
    """`" Did you mean ...?"` for the end of a message, or nothing.

    Args:
        name: As it was given.
        valid: What it could be.
        form: How a name is shown.
        count: How many names to offer at most.
    """
    close = difflib.get_close_matches(name, list(valid), count, 0.5)
    return f" Did you mean {' or '.join(map(form.format, close))}?" if close else ""

"""The name or the path that somebody who misspelt one most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

_ABOUT = 0.05
"""Of a likeness between 0 and 1: less is no reason to take an unlikely name."""


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The valid name closest in spelling to `name`, or None if none is as alike as `cutoff`: 0 (not at all) to 1."""
    return next(iter(_closest(name, valid, 1, cutoff)), None)


def did_you_mean(
    name: str, valid: Iterable[str], form: str = "{!r}", count: int = 1, likelier: Iterable[str] = ()
) -> str:
    """`" Did you mean ...?"` for the end of a message, with at most `count` names shown in a `form`, or nothing.

    The nearest of the `likelier` names comes before the nearest of all where it is about as near.
    """
    close = _closest(name, valid, count, 0.5)
    if close:
        alike = difflib.SequenceMatcher(None, close[0], name).ratio()
        first = _closest(name, likelier, 1, max(0.0, alike - _ABOUT))
        close = [*first, *(each for each in close if each not in first)][:count]
    return f" Did you mean {' or '.join(map(form.format, close))}?" if close else ""


def did_you_mean_path(path: str | Path, meant: Callable[[Path], bool]) -> str:
    """The same for a path that is not there, of which one part may be misspelt; `meant` knows the wanted kind."""
    path = missing = Path(path)
    try:
        while not missing.parent.is_dir():
            missing = missing.parent
        rest = path.relative_to(missing)
        there = [entry.name for entry in missing.parent.iterdir() if meant(entry / rest)]
    except (OSError, ValueError):  # a folder that can't be read, a name that no file can have
        return ""
    close = nearest(missing.name, there)
    if close is None or nearest(missing.stem, [Path(close).stem]) is None:  # alike by the suffix alone
        return ""
    return f" Did you mean {str(missing.parent / close / rest)!r}?"


def _closest(name: str, valid: Iterable[str], count: int, cutoff: float) -> list[str]:
    """Names in another case are the nearest, after `name` itself."""
    valid = list(valid)
    same = [each for each in valid if each.lower() == name.lower()]
    return difflib.get_close_matches(name, same, 1, 0.0) or difflib.get_close_matches(name, valid, count, cutoff)

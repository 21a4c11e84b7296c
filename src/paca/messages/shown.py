"""Text of others in messages: cut where it is long, and without what a terminal would obey."""

from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 4_000  # characters of a message: two screens

_short = reprlib.Repr()
_short.maxlevel = 4  # eight values in each of eight, and so on: 6 levels are megabytes
_short.maxstring = _short.maxother = 200
_short.maxlist = _short.maxdict = _short.maxset = _short.maxtuple = 8


def shown(value: Any) -> str:
    """`repr(value)`, shortened in its middle and in its depth."""
    return _short.repr(value)


def setting(value: Any) -> str:
    """A value of a setting as a YAML has it, on one line."""
    import yaml  # here, for `paca --version` works where little is installed

    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def printable(text: str, *, longest: int = _LONGEST) -> str:
    """The text with escape sequences, for what is no character to be seen; lines and tabs stay. Cut if it is long."""
    if len(text) > longest:
        text = f"{text[:longest]} … and {len(text) - longest:,} more characters"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def without_controls(text: str) -> str:
    """The text without what a terminal would obey, such as the start of an escape sequence; nothing else is changed."""
    return "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)

"""The answer in what a model wrote, found by a pattern and made comparable."""

from __future__ import annotations

import re

from paca.messages.errors import PacaError


def check_pattern(pattern: str | None) -> None:
    """Raises:
    PacaError: The pattern is no regular expression.
    """
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise PacaError(
            rf"The answer pattern {pattern!r} is no regular expression: {error}. For what follows #### write "
            r"'####\s*(.+)'."
        ) from error


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The answer in a text, made comparable: spaces joined, commas between digits gone; None where nothing matches.

    Args:
        text: What was written.
        pattern: A regular expression; its last match is the answer (its first group, where it has one).
    """
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        if not found:
            return None
        text = found[-1].group(1 if found[-1].re.groups else 0) or ""
    return re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(text.split()))

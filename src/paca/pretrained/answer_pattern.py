"""The answers in what a model wrote, found by a pattern and made comparable.

The pattern may be a stranger's, whose run is evaluated, and Python's `re` can't be bounded: another process matches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from paca.messages.errors import PacaError
from paca.messages.shown import shown
from paca.tuner.bounded_process import SECONDS, BoundedProcess, TookTooLong, WorkFailed

_SECONDS_EACH = 0.01
"""Of processor time for a text, besides `SECONDS` for all: `####\\s*(.+)` takes microseconds."""
_PROGRAM = """
import re
def work(request):
    pattern = re.compile(request["pattern"])
    group = 1 if pattern.groups else 0
    spans = []
    for text in request["texts"]:
        last = None
        for last in pattern.finditer(text):
            pass
        spans.append(last and last.span(group))
    return spans
"""


def check_pattern(pattern: str | None, key: str = "eval.answer_pattern") -> None:
    """Raises:
    PacaError: The pattern is no regular expression; names `key`, the setting that it stands in.
    """
    if pattern is not None:
        _spans([], pattern, key)


def extract_answers(texts: Sequence[str], pattern: str | None, key: str = "eval.answer_pattern") -> list[str | None]:
    """The answer in each text, made comparable: spaces joined, commas between digits gone; None where nothing matches.

    Args:
        texts: What was written.
        pattern: A regular expression; its last match is the answer (its first group, where it has one).
        key: The setting that it stands in, for messages.

    Raises:
        PacaError: The pattern is no regular expression, or takes too long.
    """
    if pattern is None:
        return [_comparable(text) for text in texts]
    spans = _spans(texts, pattern, key)
    return [
        None if span is None else _comparable(text[max(span[0], 0) : max(span[1], 0)])
        for text, span in zip(texts, spans, strict=True)
    ]


def _comparable(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(text.split()))


def _spans(texts: Sequence[str], pattern: str, key: str) -> list[tuple[int, int] | None]:
    """Where the last match is in each text; of a group that did not take part -1, -1."""
    try:
        spans: list[tuple[int, int] | None] = _process().ask(
            {"pattern": pattern, "texts": list(texts)}, SECONDS + _SECONDS_EACH * len(texts)
        )
    except TookTooLong:
        raise PacaError(
            f"{key}: {shown(pattern)} takes too long on {len(texts):,} texts. An expression without a repeat within a "
            r"repeat is fast, such as '####\s*(.+)' for what follows ####."
        ) from None
    except WorkFailed as error:
        raise PacaError(
            rf"{key}: {shown(pattern)} is no regular expression ({error}). For what follows #### write '####\s*(.+)'."
        ) from None
    except OSError as error:
        raise PacaError(f"{key} can't be tried, since no Python process can be started here ({error}).") from error
    return spans


@functools.cache
def _process() -> BoundedProcess:
    return BoundedProcess(_PROGRAM)

"""A reward for `benchmarks/quality/grpo.yaml`: how far the words written are those of the answer."""

from __future__ import annotations

from collections import Counter
from typing import Any


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The F1 of the words of each completion and its answer, from 0 to 1; the case of letters is ignored."""
    written = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [_f1(one.lower().split(), right.lower().split()) for one, right in zip(written, answer, strict=True)]


def _f1(words: list[str], right: list[str]) -> float:
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))

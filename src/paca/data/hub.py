"""Data from the hub without waiting for one that does not answer: its client tries half a minute for every file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import datasets
from huggingface_hub import constants

from paca.pretrained.hub import refusal, why_silent


@contextmanager
def without_waiting_for_the_hub() -> Iterator[bool]:
    """A block in which `datasets` reads its local cache alone where the hub does not answer; gives whether it does."""
    answers = (
        not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE and why_silent(constants.ENDPOINT) is None
    )
    with (
        patch.object(constants, "HF_HUB_OFFLINE", not answers),
        patch.object(datasets.config, "HF_HUB_OFFLINE", not answers),
    ):
        yield answers


def error_instead(name: str) -> str | None:
    """The message where the hub does not answer but with an error, and `name` was to come from it; else None."""
    silence = None if constants.HF_HUB_OFFLINE else why_silent(constants.ENDPOINT)
    return None if silence is None else refusal(name, silence)

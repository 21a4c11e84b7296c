"""Data from the hub without waiting for one that does not answer: its client tries half a minute for every file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import datasets
from huggingface_hub import constants

from paca.pretrained.hub import why_silent


@contextmanager
def without_waiting_for_the_hub() -> Iterator[bool]:
    """A block in which `datasets` reads its local cache alone where the hub does not answer; gives whether it does."""
    answers = not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)
    with (
        patch.object(constants, "HF_HUB_OFFLINE", not answers),
        patch.object(datasets.config, "HF_HUB_OFFLINE", not answers),
    ):
        yield answers


@cache
def _answers(endpoint: str) -> bool:
    return why_silent(endpoint) is None

"""Data from the hub without waiting for one that does not answer: its client tries half a minute for every file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

_ANSWER_SECONDS = 10.0


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
    try:
        with patch.object(logging.getLogger("huggingface_hub.utils._http"), "disabled", True):
            http_backoff("HEAD", endpoint, max_retries=1, base_wait_time=1, timeout=_ANSWER_SECONDS)
    except Exception:  # of httpx or httpx2, whichever the hub's client of the day is made with
        return False
    return True  # whatever it answered: the loaders tell what is missing

"""Whether the hub can be reached, asked once and quickly: its client tries again for half a minute for every file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from paca.messages.errors import PacaError
from paca.pretrained.location import neighbour_hint

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0


@contextmanager
def without_waiting(name: str, revision: str | None) -> Iterator[None]:
    """A block in which a hub that does not answer is left alone, as with HF_HUB_OFFLINE=1: all comes from the cache
    (errors as of `only_from_cache`).
    """
    offline = constants.HF_HUB_OFFLINE or only_from_cache(name, revision)
    with patch.object(constants, "HF_HUB_OFFLINE", offline):
        yield


@cache
def only_from_cache(name: str, revision: str | None) -> bool:
    """Whether `name` is to be read from the local cache alone, because the hub does not answer.

    Raises:
        PacaError: The hub does not answer, and the local cache has no such model.
    """
    url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision, endpoint=constants.ENDPOINT)
    retries = logging.getLogger("huggingface_hub.utils._http")
    try:
        with patch.object(retries, "disabled", True):
            http_backoff("HEAD", url, max_retries=1, base_wait_time=1, timeout=_ANSWER_SECONDS)
    except Exception as error:  # of httpx or httpx2, whichever the hub's client of the day is made with
        files = ("config.json", "tokenizer_config.json")  # of a model, of a tokenizer alone
        cached = [huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files]
        if not any(isinstance(file, str) for file in cached):
            raise PacaError(unreachable(name)) from error
        logger.warning("The hub cannot be reached (%s); reading %r from the local cache.", error, name)
        return True
    return False  # whatever it answered: the loaders tell a missing repository from a gated one


def unreachable(name: str) -> str:
    """The message for a model that is neither here nor to be fetched."""
    return (
        f"There is no file or folder {name!r} here.{neighbour_hint(name)} It looks like a hub id, but the hub cannot "
        "be reached and there is no copy in the local cache. Check the name; connect to the internet, or give a local "
        "folder or a .gguf file."
    )

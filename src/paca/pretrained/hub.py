"""Whether the hub can be reached, asked once and quickly: its client tries again for half a minute for every file."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import http_backoff

from paca.messages.errors import PacaError, first_line
from paca.pretrained.location import Location, neighbour_hint

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_PATIENCE_SECONDS = 3.0
"""A question that takes longer is told."""
_ANSWER_HOLDS_SECONDS = 60.0
"""For so long the same question is not asked again."""
_answers: dict[str, tuple[float, Exception | None]] = {}
_ADVICE = {
    401: "The token of this login (HF_TOKEN, or of `hf auth login`) is wrong or has expired: log in anew, or without "
    "one where all is public (`hf auth logout`).",
    403: "The token of this login may not read it: log in with one that may (`hf auth login`).",
    429: "It has had too many requests from here: wait for some minutes; a login has more (`hf auth login`).",
}


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
    error = why_silent(url)
    if error is None:
        return False  # whatever it answered: the loaders tell a missing repository from a gated one
    files = ("config.json", "tokenizer_config.json", "adapter_config.json")  # of a model, a tokenizer, an adapter
    cached = [huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files]
    if not any(isinstance(file, str) for file in cached):
        raise PacaError(refusal(name, error) or unreachable(name)) from error
    logger.warning("The hub cannot be reached (%s); reading %r from the local cache.", error, name)
    return True


def why_silent(url: str) -> Exception | None:
    """Why the hub gives no answer at `url`, for which it has seconds, or is too busy or too broken for one; None if it
    gives one. What it said within the last minute still holds."""
    asked, error = _answers.get(url, (-_ANSWER_HOLDS_SECONDS, None))
    if time.monotonic() - asked >= _ANSWER_HOLDS_SECONDS:
        error = _why_silent(url)
        _answers[url] = time.monotonic(), error
    return error


def _why_silent(url: str) -> Exception | None:
    limit = 2 * _ANSWER_SECONDS + 1
    told = ("Waiting for an answer of the hub (%s), at most %.0f seconds ...", constants.ENDPOINT, limit)
    waiting = threading.Timer(_PATIENCE_SECONDS, logger.warning, told)
    waiting.daemon = True
    waiting.start()
    try:
        with patch.object(logging.getLogger("huggingface_hub.utils._http"), "disabled", True):
            http_backoff("HEAD", url, max_retries=1, base_wait_time=1, timeout=_ANSWER_SECONDS)
    except Exception as error:  # of httpx or httpx2, whichever the hub's client of the day is made with
        return error
    finally:
        waiting.cancel()
    return None


def has_adapter(name: str, revision: str | None) -> bool:
    """Whether a repository of the hub holds an adapter; as far as the local cache knows, where the hub isn't asked.

    Raises:
        PacaError: The hub does not say.
    """
    with without_waiting(name, revision):
        try:
            huggingface_hub.hf_hub_download(name, "adapter_config.json", revision=revision)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return False  # of a repository that is missing or gated, a model's loader tells
        except Exception as error:  # of the hub's client, and of whichever HTTP library it is made with
            said = refusal(name, error) or f"The repository {name!r} on the hub cannot be read: {first_line(error)}"
            raise PacaError(said) from error
    return True


def check_holds_no_adapter(location: Location, revision: str | None) -> None:
    """Refuse an adapter where a model is needed: transformers would load what it names, and put it on, unchecked.

    Raises:
        PacaError: It is a hub id with an adapter.
    """
    if location.source == "hub" and has_adapter(location.name_or_path, revision):
        raise PacaError(
            f"The repository {location.name_or_path!r} on the hub holds an adapter, which nobody has checked. Give the "
            "model it was trained on; `paca chat` and `paca evaluate` take the adapter itself."
        )


def refusal(name: str, error: BaseException) -> str | None:
    """The message for what the hub answered with an error; None where `error` came from no answer of it."""
    answers = [cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)]
    # Files that a repository may lack are asked for as well.
    status = next((one.response.status_code for one in answers if not isinstance(one, EntryNotFoundError)), None)
    if status is None:
        return None
    advice = _ADVICE.get(status, "Try again later" if status >= 500 else "Check the name, and HF_ENDPOINT if it is set")
    return f"The hub ({constants.ENDPOINT}) answers {status} to the question for {name!r}. {advice.rstrip('.')}."


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it came from, and so on."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def unreachable(name: str) -> str:
    """The message for a model that is neither here nor to be fetched."""
    return (
        f"There is no file or folder {name!r} here (working folder: {Path.cwd()}).{neighbour_hint(name)} It looks like "
        "a hub id, but the hub cannot be reached and there is no copy in the local cache. Check the name; connect to "
        "the internet, or give a local folder or a .gguf file."
    )

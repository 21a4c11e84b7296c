"""A language model as a judge, behind any server that speaks OpenAI's protocol for chats: asked patiently."""

from __future__ import annotations

import email.utils
import json
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import requests

from paca.messages.errors import PacaError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that may be different the next time."""

_INSTEAD: dict[str, dict[str, Any]] = {"max_tokens": {"max_completion_tokens": 8192}, "temperature": {}}
"""Settings that some judges refuse, and what they take. Those that reason count their thoughts as tokens."""

_LARGEST = 4 * 2**20
"""Bytes of an answer; a verdict has some thousands."""

LONGEST_WAIT = 120.0
"""Seconds; a server that asks for more is taken at its word only up to here."""


@dataclass(frozen=True)
class Usage:
    """What answers took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    """Sent, those that had to be repeated included."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.requests + other.requests,
        )


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how patiently it is asked."""

    url: str
    """Where the API begins, such as `http://localhost:8000/v1`."""
    model: str
    key: str | None = None
    """Sent as a bearer token."""
    timeout: float = 120.0
    """Seconds to wait for an answer, all of it."""
    tries: int = 6
    """How often one question is asked at most."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled each time, unless the server says how long (`Retry-After`)."""

    def __post_init__(self) -> None:
        """Raises:
        PacaError: The URL is none, or no model is named.
        """
        if not self.url.startswith(("http://", "https://")):
            raise PacaError(
                f"--judge-url is {self.url!r}; expected where an API begins, such as http://localhost:8000/v1."
            )
        if not self.model.strip():
            raise PacaError("--judge-model is empty; name the judge as its server does.")


class Judge:
    """Asks a judge; from several threads at once, if wanted."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self._stopped = Event()
        self._how: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}

    def stop(self) -> None:
        """Have those that wait for another try give up."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._stopped.is_set()

    def ask(self, messages: list[dict[str, str]]) -> tuple[str, Usage]:
        """The judge's answer, and what it took. One that gives no text, as where it declines, answers with none.

        Args:
            messages: The conversation, as the protocol has it.

        Raises:
            PacaError: The server refuses, cannot be reached, or did not answer properly in all tries.
        """
        settings, failure, asked_for, sent = self.settings, "", None, 0
        asked = {"model": settings.model, "messages": messages}
        url = settings.url.rstrip("/") + "/chat/completions"
        for attempt in range(settings.tries):
            wait = settings.first_wait * 2 ** (attempt - 1) if asked_for is None else min(asked_for, LONGEST_WAIT)
            if attempt and self._stopped.wait(wait):
                raise PacaError("Judging was stopped.")
            asked_for = None
            try:
                while True:
                    body, sent = {**asked, **self._how}, sent + 1
                    response, content = self._post(url, body)
                    said = content.decode(errors="replace")
                    if response.status_code != 400 or not self._gives_way(body, said):
                        break
                if response.ok:
                    return _read(said, sent)
                failure = f"HTTP {response.status_code} {response.reason}: {_beginning(said)}"
                if response.status_code not in _RETRIED:
                    raise PacaError(f"The judge at {settings.url} refuses: {failure}")
                asked_for = _retry_after(response.headers.get("Retry-After"))
            except PacaError:
                raise
            # Nobody there, no answer in time or none of the protocol's. The client gives plain ValueErrors too, for a
            # redirect to no address and for a chunk of less than no length.
            except (requests.RequestException, ValueError) as error:
                failure = str(error).replace(settings.key or "\0", "(the key)")
        raise PacaError(
            f"The judge at {settings.url} did not answer in {settings.tries} tries; the last time: {failure}."
            " Verdicts so far are kept; the same command goes on."
        )

    def _post(self, url: str, body: dict[str, Any]) -> tuple[requests.Response, bytes]:
        """Send a question, and wait for the whole answer: one that trickles in must end in time too.

        Also where it does so before its text begins, which `requests` waits for: then nobody waits for `requests`.
        """
        outcome: SimpleQueue[Any] = SimpleQueue()

        def exchange() -> None:
            try:
                outcome.put(self._exchange(url, body))
            except BaseException as error:
                outcome.put(error)

        Thread(target=exchange, daemon=True).start()
        try:
            got = outcome.get(timeout=self.settings.timeout + min(1.0, self.settings.timeout))
        except Empty:
            raise requests.Timeout(f"the answer did not begin in {self.settings.timeout:g} s") from None
        if isinstance(got, BaseException):
            raise got
        return got

    def _exchange(self, url: str, body: dict[str, Any]) -> tuple[requests.Response, bytes]:
        timeout, content = self.settings.timeout, bytearray()
        end = time.monotonic() + timeout
        with requests.post(url, json=body, timeout=timeout, auth=self._sign, stream=True) as response:
            for byte in response.iter_content(1):  # reading more would wait for more
                content += byte
                if time.monotonic() > end:
                    raise requests.Timeout(f"the answer did not end in {timeout:g} s")
                if len(content) > _LARGEST:
                    raise requests.exceptions.InvalidJSONError(f"the answer is longer than {_LARGEST:,} bytes")
        return response, bytes(content)

    def _gives_way(self, body: dict[str, Any], refusal: str) -> bool:
        """Whether a refusal is of a setting that can be left out; it is, from here on."""
        refused = next((name for name in _INSTEAD if name in body and name in refusal), None)
        if refused is None:
            return False
        # As a whole, as other threads read it.
        self._how = {name: value for name, value in self._how.items() if name != refused} | _INSTEAD[refused]
        return True

    def _sign(self, request: Any) -> Any:
        """As a function, so that no password of ~/.netrc takes the key's place."""
        if self.settings.key:
            request.headers["Authorization"] = f"Bearer {self.settings.key}"
        return request


def _read(said: str, sent: int) -> tuple[str, Usage]:
    try:
        answer = json.loads(said)
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise requests.exceptions.InvalidJSONError(f"no choices[0].message.content in {_beginning(said)}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is none of the decoder's own errors
        raise requests.exceptions.InvalidJSONError(f"{error}: {_beginning(said)}") from error
    text = "" if text is None else text
    if not isinstance(text, str):
        raise requests.exceptions.InvalidJSONError(f"content is {text!r}; expected text")
    text = text.encode(errors="replace").decode()  # JSON can hold halves of characters, and no file can
    used = answer.get("usage")
    counts = [used.get(key) if isinstance(used, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    # Not every server counts.
    prompt, completion = (count if type(count) is int and 0 <= count < 2**63 else 0 for count in counts)
    return text, Usage(prompt, completion, sent)


def _retry_after(value: str | None) -> float | None:
    """Seconds that `Retry-After` asks for: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _beginning(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "…"

"""A language model as a judge, behind any server that speaks OpenAI's protocol for chats: asked patiently."""

from __future__ import annotations

import email.utils
import itertools
import json
import re
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

import requests

from paca.evaluation.judge_settings import JudgeSettings
from paca.messages.errors import PacaError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that may be different the next time."""

_BUSY = (429, 503, 529)
"""Those of a judge that asks for patience: limits count requests by the minute."""

_TOO_LARGE = (400, 413, 422)
"""How servers refuse more tokens than they have room for."""

_TOKENS, _MOST_TOKENS = 1024, 8192
"""Of an answer: what it may take, and what it may after it was cut off."""

_INSTEAD: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_completion_tokens": _MOST_TOKENS},
    "temperature": {},
}
"""Settings that some judges refuse, and what they take. Those that reason count their thoughts as tokens."""

_TOO_LONG = re.compile("context[_ ](length|window)|maximum context", re.IGNORECASE)
"""In a refusal of a question that leaves no room for its answer: though it may name `max_tokens`, that stays."""

_FILTERED = re.compile("content_filter|content management policy", re.IGNORECASE)
"""In a refusal (400, 422) of one question, by a filter of what it says: it stays without a grade."""

_FEWEST_TOKENS = 128
"""Of an answer to such a question; one that has no room for them stays without a grade."""

_LARGEST = 4 * 2**20
"""Bytes of an answer; a verdict has some thousands."""

LONGEST_WAIT = 120.0
"""Seconds; a server that asks for more is taken at its word only up to here."""

_LONGEST_DOUBLED = 60.0
"""Seconds of a wait that nobody asked for."""


@dataclass(frozen=True)
class Usage:
    """What answers took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    """Sent, those that had to be repeated included; but those of a question that got no verdict at all."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.requests + other.requests,
        )


class Answer(NamedTuple):
    """What a judge said, and what that took."""

    text: str
    usage: Usage
    cut: bool = False
    """Whether it ends where its tokens did. Then a grade in it is no verdict yet."""


class Judge:
    """Asks a judge; from several threads at once, if wanted."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self._stopped = Event()
        self._how: dict[str, Any] = {"temperature": 0, "max_tokens": _TOKENS}

    def stop(self) -> None:
        """Have those that wait for another try give up."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._stopped.is_set()

    def ask(self, messages: list[dict[str, str]]) -> Answer:
        """The judge's answer. One that gives no text, as where it declines, or a filter does, answers with none.

        One that was cut off for lack of tokens is asked for anew with twice as many, up to 8192.

        Args:
            messages: The conversation, as the protocol has it.

        Raises:
            PacaError: The server refuses, cannot be reached, or did not answer properly in all tries.
        """
        used, tokens = Usage(), _TOKENS
        while True:
            answer = self._ask(messages, tokens)
            used += answer.usage
            if not answer.cut or tokens >= _MOST_TOKENS or "max_tokens" not in self._how:
                return answer._replace(usage=used)
            tokens *= 2

    def _ask(self, messages: list[dict[str, str]], tokens: int) -> Answer:
        """As `ask`, with so many tokens."""
        settings, failure, sent = self.settings, "", 0
        asked = {"model": settings.model, "messages": messages}
        url = settings.endpoint + "/chat/completions"
        failures, waited = 0, 0.0
        for attempt in itertools.count(1):
            busy, asked_for = False, None
            try:
                while True:
                    body, sent = {**asked, **self._how}, sent + 1
                    if "max_tokens" in body:
                        body["max_tokens"] = tokens
                    response, content = self._post(url, body, settings.timeout * tokens / _TOKENS)
                    said = content.decode(errors="replace")
                    if response.status_code in (400, 422) and _FILTERED.search(said):
                        return Answer("", Usage(requests=sent))
                    if tokens > _TOKENS and response.status_code in _TOO_LARGE:
                        return Answer("", Usage(requests=sent), cut=True)
                    unknown = re.search("not supported|unsupported", said, re.IGNORECASE)  # of a setting
                    if response.status_code == 400 and _TOO_LONG.search(said) and not unknown:  # with its answer
                        if "max_tokens" not in body or tokens <= _FEWEST_TOKENS:
                            return Answer("", Usage(requests=sent))
                        tokens //= 2
                    elif response.status_code != 400 or not self._gives_way(body, said):
                        break
                if response.ok:
                    return _read(said, sent)
                failure = f"HTTP {response.status_code} {response.reason}: {_beginning(said)}"
                busy = response.status_code in _BUSY
                if response.status_code not in _RETRIED:
                    raise PacaError(f"The judge at {settings.url} refuses: {failure}")
                asked_for = _retry_after(response.headers.get("Retry-After"))
            except PacaError:
                raise
            # Nobody there, no answer in time or none of the protocol's. The client gives plain ValueErrors too, for a
            # redirect to no address and for a chunk of less than no length.
            except (requests.RequestException, ValueError) as error:
                failure = _without(settings.key, str(error))
            failures += not busy
            if failures >= settings.tries or waited >= settings.patience:
                break
            doubled = min(settings.first_wait * 2 ** (attempt - 1), _LONGEST_DOUBLED)
            wait = doubled if asked_for is None else min(asked_for, LONGEST_WAIT)
            if attempt >= settings.tries:  # after so many tries, a server's "at once" is not believed any more
                wait = max(wait, doubled)
            waited += wait if busy else 0.0
            if self._stopped.wait(wait):
                raise PacaError("Judging was stopped.")
        raise PacaError(
            f"The judge at {settings.url} did not answer in {attempt} tries; the last time: {failure}."
            " Verdicts so far are kept; the same command goes on."
        )

    def _post(self, url: str, body: dict[str, Any], timeout: float) -> tuple[requests.Response, bytes]:
        """Send a question, and wait for the whole answer: one that trickles in must end in time too.

        Also where it does so before its text begins, which `requests` waits for: then nobody waits for `requests`.
        """
        outcome: SimpleQueue[Any] = SimpleQueue()

        def exchange() -> None:
            try:
                outcome.put(self._exchange(url, body, timeout))
            except BaseException as error:
                outcome.put(error)

        Thread(target=exchange, daemon=True).start()
        try:
            got = outcome.get(timeout=timeout + min(1.0, timeout))
        except Empty:
            raise requests.Timeout(f"the answer did not begin in {timeout:g} s") from None
        if isinstance(got, BaseException):
            raise got
        return got

    def _exchange(self, url: str, body: dict[str, Any], timeout: float) -> tuple[requests.Response, bytes]:
        content, end = bytearray(), time.monotonic() + timeout
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


def _read(said: str, sent: int) -> Answer:
    try:
        answer = json.loads(said)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise requests.exceptions.InvalidJSONError(f"no choices[0].message.content in {_beginning(said)}") from error
    except json.JSONDecodeError as error:
        raise requests.exceptions.InvalidJSONError(
            f"the answer was no JSON: {_beginning(said) or '(empty)'}. --judge-url should be where an API of OpenAI's "
            "protocol begins, an address that ends in /v1, such as http://localhost:8000/v1"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is none of the decoder's own errors
        raise requests.exceptions.InvalidJSONError(f"{error}: {_beginning(said)}") from error
    text = "" if text is None else _joined(text)
    if not isinstance(text, str):
        raise requests.exceptions.InvalidJSONError(f"content is {text!r}; expected text")
    text = text.encode(errors="replace").decode()  # JSON can hold halves of characters, and no file can
    used = answer.get("usage")
    counts = [used.get(key) if isinstance(used, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    # Not every server counts.
    prompt, completion = (count if type(count) is int and 0 <= count < 2**63 else 0 for count in counts)
    return Answer(text, Usage(prompt, completion, sent), cut=choice.get("finish_reason") == "length")


def _joined(content: Any) -> Any:
    """The text of a content that comes in parts; those of other kinds, such as thoughts, are left out."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


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


def _without(key: str | None, text: str) -> str:
    """A message that tells no key; a short one, as local servers take, only where it is a word of its own."""
    if not key:
        return text
    return re.sub(re.escape(key) if len(key) >= 8 else rf"(?<!\w){re.escape(key)}(?!\w)", "(the key)", text)

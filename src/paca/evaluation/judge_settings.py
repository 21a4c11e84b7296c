"""Which judge is asked, where, and how patiently."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from paca.messages.errors import PacaError

_PORTS = {"http": 80, "https": 443}
"""Of a URL that names none."""


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how patiently it is asked."""

    url: str
    """Where the API begins, such as `http://localhost:8000/v1`."""
    model: str
    key: str | None = None
    """Sent as a bearer token."""
    timeout: float = 120.0
    """Seconds to wait for an answer, all of it; twice as long for one that may be twice as long."""
    tries: int = 6
    """How often one question is asked at most; those not counted where the judge is busy (429, 503, 529)."""
    patience: float = 300.0
    """Seconds after which a judge that is busy is given up."""
    first_wait: float = 1.0
    """Seconds before the second try, more than 0; doubled each time up to a minute, unless the server says how long
    (`Retry-After`)."""

    def __post_init__(self) -> None:
        """Raises:
        PacaError: The URL is none, or no model is named.
        """
        try:
            _ = self.endpoint
        except (ValueError, KeyError) as error:  # no host, a port that is no number; no scheme, or another one
            raise PacaError(
                f"--judge-url is {self.url!r}; expected where an API begins, such as http://localhost:8000/v1."
            ) from error
        if not self.model.strip():
            raise PacaError("--judge-model is empty; name the judge as its server does.")

    @property
    def endpoint(self) -> str:
        """`url`, written the same however the same place was: scheme and host in lower case, and without the port that
        the scheme has anyway or slashes at the end."""
        parts = urlsplit(self.url)
        user, at, host = parts.netloc.rpartition("@")
        if parts.port in (None, _PORTS[parts.scheme]):
            host = re.sub(r":\d*$", "", host)
        if not host:
            raise ValueError("no host")
        return urlunsplit(parts._replace(netloc=user + at + host.lower())).rstrip("/")

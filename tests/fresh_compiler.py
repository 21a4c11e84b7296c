"""A compiler that remembers nothing of other tests, and does not time itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Left alone, it flushes the processor's cache after each frame, to time its guards for a log: 30 ms."""
    import torch._dynamo.guards  # here: it takes seconds

    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

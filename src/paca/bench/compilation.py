"""Counting what torch.compile makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo
from torch._dynamo.utils import counters


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    return int(counters["stats"]["unique_graphs"])


@contextmanager
def room_for_many_models() -> Iterator[None]:
    """Let many models of one class be compiled in one process.

    By default dynamo gives up after 8 graphs of one function and runs it eagerly from then on, without an error; with
    more methods than that the later ones would not be compiled at all.
    """
    with torch._dynamo.config.patch(
        recompile_limit=1024, accumulated_recompile_limit=4096, fail_on_recompile_limit_hit=True
    ):
        yield

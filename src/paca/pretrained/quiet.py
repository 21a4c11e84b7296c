"""What transformers and datasets print while they load something, hidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hide what transformers says that it misses, such as a head's weights in a checkpoint: a new one was asked for."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_progress_bars(of: Any = logging) -> Iterator[None]:
    """Hide the bars of a library: by default those of transformers, which count parameters, else those of `datasets`.
    Downloads keep theirs."""
    was_enabled = of.is_progress_bar_enabled()
    of.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            of.enable_progress_bar()

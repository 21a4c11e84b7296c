"""A process that is forked while another thread computes: the child has its locks and notes, but not the thread."""

from __future__ import annotations

import os

from paca.columns.resident import WRITING
from paca.columns.state import ALONE
from paca.columns.stepping import STEPPING
from paca.layers.experts_by_adapter import ONE_AT_A_TIME
from paca.layers.mixed_batch import end_those_of_other_threads
from paca.lean.float32_products import TIMING


def forget_other_threads() -> None:
    """Called in the child, before anything else runs there."""
    for lock in (WRITING, ONE_AT_A_TIME, TIMING):
        lock._at_fork_reinit()  # type: ignore[attr-defined]
    ALONE._call = None
    STEPPING.clear()
    end_those_of_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_other_threads)

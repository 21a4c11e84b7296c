"""Optimizers' steps that raised, so that the hook after them did not run."""

from __future__ import annotations

import inspect
import itertools
import sys
from typing import Any

import torch

_WRAPPER = torch.optim.Optimizer.profile_hook_step.__code__  # wraps every optimizer's step


def forget_raised(stepping: dict[int, tuple[list[Any], list[Any], int]]) -> None:
    """Take threads that are in no step any more off the list; what they were writing is in doubt."""
    for thread in list(stepping):
        if not _is_in_a_step(thread):
            for layer_of, adapter_name in itertools.chain(*stepping.pop(thread, ())[:2]):
                layer = layer_of()
                if layer is not None:
                    layer.doubted(adapter_name)


def _is_in_a_step(thread: int) -> bool:
    frame = last = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _WRAPPER.co_filename:
            return True
        last, frame = frame, frame.f_back
    # The thread runs on: a generator that it was in may have yielded, and then has no caller. So it is asked again.
    return last is not None and bool(last.f_code.co_flags & inspect.CO_GENERATOR) and _is_in_a_step(thread)

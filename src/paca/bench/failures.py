"""What went wrong while a method ran, in the words of a report."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on CUDA or (torch's CPU allocator) as a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)


def failure_reason(error: BaseException) -> str:
    """One line: that memory ran out, or the error's class and the beginning of its message."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]

"""Memory ran out: how that is recognised, on every device."""

from __future__ import annotations

import re

import torch

_LIBRARIES = ("STATUS_ALLOC_FAILED", "std::bad_alloc", "cannot allocate memory")  # cuBLAS and cuDNN, C++, the system
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # torch's, on POSIX and on Windows: a RuntimeError

_SAID = re.compile(
    "|".join(("memory ran out", "not fit into memory", "out ?of ?memory", "MemoryError", *_CPU_ALLOCATOR, *_LIBRARIES)),
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))  # CUDA's, cuBLAS's, NCCL's among them


def says_out_of_memory(text: str) -> bool:
    """Whether what a process of paca's, or Python, said last is that memory ran out."""
    return _SAID.search(text) is not None


def failure_reason(error: BaseException) -> str:
    """One line for a report: that memory ran out, or the error's class and the beginning of its message."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]

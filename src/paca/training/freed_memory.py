"""What the C library does with memory that training frees, on a CPU: each step frees and asks for the same again."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, unless the user has set how malloc behaves.

    By default glibc gives large tensors back to the kernel when they are freed, and gets them again, page by page and
    zeroed, in the next step. Measured on 2 cores of a virtual machine, where a page fault takes 2.3 microseconds: 14
    steps of the demo ran at 375 instead of 279 tokens/s, at a peak of 2.32 instead of 2.16 GiB
    (docs/notes/demo-tuning.md).

    Returns:
        Whether malloc was told so: only glibc's can be.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))

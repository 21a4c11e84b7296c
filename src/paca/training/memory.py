"""The most memory a run has held: the CUDA allocator's counter, or the resident set of the process."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

OF_CUDA = "CUDA allocator"


def reset_peak_memory() -> None:
    """Start counting the peak of the CUDA allocator anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def forget_peak_resident_set() -> None:
    """Give back what was freed, and count the peak of the resident set anew, where the system can: on Linux.

    For work that one run has to do and another finds done.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc's
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes.

    Args:
        device: Where the model runs. On CUDA it is the allocator's peak on that device; elsewhere the peak resident
            set of this process, which includes loading.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_set()


def describe_peak_memory(device: torch.device) -> str:
    """What `peak_memory` counts on this device, in words."""
    return OF_CUDA if device.type == "cuda" else "resident set of the process"


def peak_resident_set() -> int:
    """Peak resident set of this process, in bytes."""
    if sys.platform == "linux":
        # Not getrusage: its ru_maxrss starts at the parent's resident set after fork and exec.
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return psutil.Process().memory_info().peak_wset

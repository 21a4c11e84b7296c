"""The memory that this process holds, with a peak that can be reset."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
import weakref

import psutil
import torch

from paca.training.memory import peak_resident_set

_CLEAR = "/proc/self/clear_refs"
_PERIOD = 0.001  # seconds


class AllocatedOnCuda:
    """What the CUDA allocator has handed out.

    Args:
        device: The device.
        budget: The allocator's limit in bytes.
    """

    source = "CUDA allocator"

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self.device = device
        if budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)

    def now(self) -> int:
        """Bytes handed out."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        """Start the peak anew."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes handed out since `reset`."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


class ResidentSet:
    """The resident set of this process.

    On Linux the kernel keeps the peak itself, exactly; elsewhere a thread samples it every millisecond.
    """

    def __init__(self) -> None:
        self.by_kernel = _kernel_peak_resets()
        self.source = f"resident set ({'kernel' if self.by_kernel else 'sampler'})"
        self._peak = 0
        if not self.by_kernel:
            threading.Thread(target=_sample, args=(weakref.ref(self),), daemon=True).start()

    def now(self) -> int:
        """Bytes resident, after garbage is collected and freed memory is given back."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)

    def reset(self) -> None:
        """Start the peak anew, at what is resident now."""
        if self.by_kernel:
            _reset_kernel_peak()
        self._peak = int(psutil.Process().memory_info().rss)

    def peak(self) -> int:
        """The most bytes resident since `reset`."""
        return peak_resident_set() if self.by_kernel else self._peak


def _sample(reference: weakref.ref[ResidentSet]) -> None:
    process = psutil.Process()
    while (watch := reference()) is not None:
        watch._peak = max(watch._peak, process.memory_info().rss)
        del watch  # ends with what it samples for
        time.sleep(_PERIOD)


def _reset_kernel_peak() -> None:
    with open(_CLEAR, "w", encoding="ascii") as file:
        file.write("5")


def _kernel_peak_resets() -> bool:
    """Whether the kernel resets its peak when asked to; some containers forbid or ignore it."""
    if sys.platform != "linux":
        return False
    try:
        block = torch.ones(2**24)  # 64 MiB
        before = peak_resident_set()
        del block
        ctypes.CDLL(None).malloc_trim(0)  # a process that keeps freed memory would still have it
        _reset_kernel_peak()
        return peak_resident_set() < before - 32 * 2**20
    except OSError:
        return False

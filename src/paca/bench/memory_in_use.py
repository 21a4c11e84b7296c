"""The memory that this process holds, with a peak that can be reset."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import psutil
import torch

from paca.training.memory import peak_resident_set


class AllocatedOnCuda:
    """What the CUDA allocator has handed out, of which it may hand out `budget` bytes."""

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
    """The resident set of this process. Its peak is the kernel's own, and starts anew only where the kernel lets it."""

    def __init__(self) -> None:
        block = torch.ones(2**24)  # 64 MiB
        before = self.peak()
        del block
        self.now()
        self.reset()
        resets = self.peak() < before - 32 * 2**20
        self.source = "resident set" if resets else "resident set, peak since the process began"

    def now(self) -> int:
        """Bytes resident, after garbage is collected and freed memory is given back."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)

    def reset(self) -> None:
        """Start the peak anew, at what is resident now; some containers forbid or ignore it."""
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")

    def peak(self) -> int:
        """The most bytes resident since `reset`."""
        return peak_resident_set()

"""The memory of this process as the operating system counts it, with a peak that can be reset."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
import weakref

import psutil

_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"
_PERIOD = 0.001  # seconds


class ResidentSetPeak:
    """Watches the resident set from `reset` on.

    On Linux the kernel keeps the peak itself, exactly; elsewhere a thread samples it every millisecond.

    Attributes:
        source: `"kernel"` or `"sampler"`.
    """

    def __init__(self) -> None:
        self.source = "kernel" if _kernel_peak_resets() else "sampler"
        self._peak = 0
        if self.source == "sampler":
            threading.Thread(target=_sample, args=(weakref.ref(self),), daemon=True).start()

    def now(self) -> int:
        """Bytes resident now, after garbage is collected and freed memory is given back."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)

    def reset(self) -> None:
        """Start the peak anew, at what is resident now."""
        if self.source == "kernel":
            with open(_CLEAR, "w", encoding="ascii") as file:
                file.write("5")
        self._peak = int(psutil.Process().memory_info().rss)

    def peak(self) -> int:
        """The most bytes resident since `reset`."""
        return _kernel_peak() if self.source == "kernel" else self._peak


def _sample(reference: weakref.ref[ResidentSetPeak]) -> None:
    process = psutil.Process()
    while (watch := reference()) is not None:
        watch._peak = max(watch._peak, process.memory_info().rss)
        del watch  # ends with what it samples for
        time.sleep(_PERIOD)


def _kernel_peak() -> int:
    with open(_STATUS, encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no VmHWM")


def _kernel_peak_resets() -> bool:
    """Whether the kernel resets its peak when asked to; some containers forbid or ignore it."""
    if sys.platform != "linux":
        return False
    try:
        block = bytearray(64 * 2**20)
        block[::4096] = b"x" * len(block[::4096])  # touch every page
        before = _kernel_peak()
        del block
        with open(_CLEAR, "w", encoding="ascii") as file:
            file.write("5")
        return _kernel_peak() < before - 32 * 2**20
    except OSError:
        return False

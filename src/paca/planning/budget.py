"""How much memory a device has for a run, and whether that is too little."""

from __future__ import annotations

import torch

from paca.messages.errors import PacaError
from paca.messages.units import format_bytes
from paca.planning.estimate import PlannedModel, estimate
from paca.planning.setting import Setting


def available_memory(device: str) -> int:
    """Bytes that this process could use on `device`: free memory of the GPU, or what the system has available.

    Raises:
        PacaError: `device` is `"cuda"` and there is none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise PacaError("There is no CUDA device here; say how much memory to plan for (--memory 24GiB).")
        return torch.cuda.mem_get_info()[0]
    import psutil

    own = psutil.Process().memory_info().rss  # the estimate counts the libraries of a process
    return psutil.virtual_memory().available + own


def warn_if_too_large(model: PlannedModel, setting: Setting, available: int | None = None) -> str | None:
    """Say so if training would need more memory than there is.

    Args:
        model: On the meta device, with its adapter in.
        setting: How it is trained.
        available: Bytes; what the device has free when None.

    Returns:
        A message that says how much is missing and what would help, or None if it fits or can't be foretold.
    """
    available = available_memory(setting.device) if available is None else available
    try:
        needed = estimate(model, setting)
    except PacaError:
        return None  # a model that can't be planned may train all the same
    if needed.total <= available:
        return None
    largest = next(iter(needed.parts))
    return (
        f"This run needs about {format_bytes(needed.total)} ({setting.batch_size} sequences of "
        f"{setting.sequence_length} tokens at a time), and {format_bytes(available)} are available. The largest part "
        f"is {largest}: {format_bytes(needed.parts[largest])}. `paca plan` finds settings that fit."
    )

"""How much memory a device has for a run, and whether that is too little."""

from __future__ import annotations

import torch

from paca.messages.errors import PacaError
from paca.messages.units import format_bytes
from paca.planning.memory_estimate import PlannedModel, estimate, root_of
from paca.planning.passes import task_of
from paca.planning.setting import Setting


def available_memory(device: str) -> int:
    """Bytes that this process could use: free on the GPU (PacaError without one), or in the system."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise PacaError("There is no CUDA device here; say how much memory to plan for (--memory 24GiB).")
        return torch.cuda.mem_get_info()[0]
    import psutil

    own = psutil.Process().memory_info().rss  # the estimate counts the libraries of a process
    return psutil.virtual_memory().available + own


def warn_if_too_large(model: PlannedModel, setting: Setting, available: int) -> str | None:
    """What to tell the user if training would need more memory than there is; None if it fits or can't be foretold.

    Args:
        model: On the meta device, with its adapter in.
        setting: How it is trained.
        available: Bytes, from `available_memory`.
    """
    try:
        needed = estimate(model, setting)
    except PacaError:
        return None  # a model that can't be planned may train all the same
    if needed.total <= available:
        return None
    largest = next(iter(needed.parts))
    images = task_of(root_of(model)) == "images"
    batch = setting.batch_in_words(images)
    return (
        f"This run needs about {format_bytes(needed.total)} ({batch} at a time), and {format_bytes(available)} are "
        f"available. The largest part is {largest}: {format_bytes(needed.parts[largest])}. `paca plan` finds settings "
        "that fit."
    )

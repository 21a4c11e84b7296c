"""How much memory a device has for a run, whether that is too little, and which batch takes the most."""

from __future__ import annotations

from collections.abc import Sequence

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


def warn_if_too_large(model: PlannedModel, setting: Setting, available: int | None = None) -> str | None:
    """What to tell the user if training would need more memory than there is; None if it fits or can't be foretold.

    Args:
        model: On the meta device, with its adapter in.
        setting: How it is trained.
        available: Bytes; what the device has free when None.
    """
    available = available_memory(setting.device) if available is None else available
    try:
        needed = estimate(model, setting)
    except PacaError:
        return None  # a model that can't be planned may train all the same
    if needed.total <= available:
        return None
    largest = next(iter(needed.parts))
    images = task_of(root_of(model)) == "images"
    batch = f"{setting.batch_size} {'images' if images else f'sequences of {setting.sequence_length} tokens'}"
    return (
        f"This run needs about {format_bytes(needed.total)} ({batch} at a time), and {format_bytes(available)} are "
        f"available. The largest part is {largest}: {format_bytes(needed.parts[largest])}. `paca plan` finds settings "
        "that fit."
    )


def longest_batch(lengths: Sequence[int], batch_size: int, max_length: int | None = None) -> list[int]:
    """The numbers of the `batch_size` longest examples (or of all), longest first.

    A batch is padded to its longest example, so no batch of the training is larger: if it trains, every batch does.
    `lengths` are in tokens; longer examples are cut at `max_length`.

    Raises:
        PacaError: There are no examples, or `batch_size` is below 1.
    """
    if not lengths:
        raise PacaError("There are no examples, so there is no longest batch to try.")
    if batch_size < 1:
        raise PacaError(f"batch_size is {batch_size}; it must be 1 or more.")
    cut = [length if max_length is None else min(length, max_length) for length in lengths]
    return sorted(range(len(cut)), key=lambda number: (-cut[number], number))[:batch_size]

"""Choices that all processes of a run have to share."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def same_on_all_ranks(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The choices of the first process, in every process of the run; all have to call this at the same time.

    Args:
        chosen: int64 tensors by name; the same names and shapes in every process.

    Returns:
        The same names with the first process' values, on the CPU.
    """
    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not together or not chosen:
        return chosen
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    flat = torch.cat([indices.flatten() for indices in chosen.values()]).to(device)
    distributed.broadcast(flat, src=0)
    parts = flat.cpu().split([indices.numel() for indices in chosen.values()])
    return {name: part.view(old.shape) for (name, old), part in zip(chosen.items(), parts, strict=True)}

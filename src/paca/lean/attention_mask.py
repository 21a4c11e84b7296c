"""One additive attention mask for all layers.

transformers hands SDPA a boolean mask (batches with padding, sliding windows); SDPA turns it into an additive one in
the query's dtype and keeps that for the backward pass, anew in every layer: `2 * sequence` bytes per token and layer in
half precision, as much as a hidden state of that width. Made once and handed on, all layers keep the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ADDITIVE = "_paca_lean_additive"


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is true and -inf elsewhere, which is what SDPA makes of it; remembered on `mask` itself.

    Args:
        mask: boolean, any shape.
        dtype: the query's.
    """
    known: Tensor | None = getattr(mask, _ADDITIVE, None)
    if known is None or known.dtype != dtype:
        known = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
        setattr(mask, _ADDITIVE, known)
    return known


def query_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype that a projection of `hidden_states` has here: autocast's, or its own."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype

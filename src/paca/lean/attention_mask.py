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
    """0 where the boolean `mask` is true and -inf elsewhere, which is what SDPA makes of it for a query of `dtype`.

    Remembered on `mask` itself, until that is changed.
    """
    version = None if mask.is_inference() else mask._version  # a mask may be a buffer that is filled anew
    known: tuple[int, Tensor] | None = getattr(mask, _ADDITIVE, None)
    if known is not None and known[0] == version and known[1].dtype == dtype:
        return known[1]
    made = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if version is not None:
        setattr(mask, _ADDITIVE, (version, made))
    return made


def query_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype that a projection of `hidden_states` has here: autocast's, or its own."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype

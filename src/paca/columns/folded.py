"""Folded columns: those that an adapter trained before others took their turn (`paca.rotate`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FOLDED_DELTA, FOLDED_INDICES = "paca_delta.paca_folded", "paca_indices.paca_folded"
"""What a whole model's state dict calls folded columns, so that PEFT takes them for an adapter's, not the base's."""


@dataclass(frozen=True, eq=False)
class Folded:
    """On the CPU, never changed: still a part of the adapter, with its scale, and of the weight that holds it."""

    indices: Tensor
    """`(k,)` int64, sorted and unique, none of them among those that are trained now."""
    delta: Tensor
    """As the adapter's delta, with `k` columns."""

    @classmethod
    def taken_from(cls, state_dict: dict[str, Tensor], delta_name: str) -> Folded:
        """Take the two tensors out of a state dict."""
        delta, indices = state_dict.pop(delta_name), state_dict.pop(delta_name.replace(FOLDED_DELTA, FOLDED_INDICES))
        return cls(indices.cpu().clone(), delta.detach().cpu().clone())

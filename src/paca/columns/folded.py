"""Folded columns: those that an adapter trained before others took their turn (`paca.rotate`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

FOLDED_DELTA, FOLDED_INDICES = "paca_delta.paca_folded", "paca_indices.paca_folded"
"""What a whole model's state dict calls folded columns, so that PEFT takes them for an adapter's, not the base's."""


_VALUES_AT_ONCE = 2**20  # of a weight on their way from and to the CPU: a few MiB


@dataclass(frozen=True, eq=False)
class Folded:
    """On the CPU, never changed: still a part of the adapter, with its scale, and of the weight that holds it."""

    indices: Tensor
    """`(k,)` int64, sorted and unique, none of them among those that are trained now."""
    delta: Tensor
    """As the adapter's delta, with `k` columns."""

    @staticmethod
    def pieces(positions: Tensor, values: Tensor, weight: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Values of columns of `weight` a few at a time, on its device: they pass it so."""
        size = max(1, _VALUES_AT_ONCE * weight.shape[dim] // max(1, weight.numel()))
        for some, of_them in zip(positions.split(size), values.split(size, dim), strict=True):
            yield some.to(weight.device), of_them.to(weight.device)

    @classmethod
    def taken_from(cls, state_dict: dict[str, Tensor], delta_name: str) -> Folded:
        """Take the two tensors out of a state dict."""
        delta, indices = state_dict.pop(delta_name), state_dict.pop(delta_name.replace(FOLDED_DELTA, FOLDED_INDICES))
        return cls(indices.cpu().clone(), delta.detach().cpu().clone())

"""Folded columns: those that an adapter trained before others took their turn (`paca.rotate`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Folded:
    """On the CPU, never changed: still a part of the adapter, with its scale, and of the weight that holds it."""

    indices: Tensor
    """`(k,)` int64, sorted and unique, none of them among those that are trained now."""
    delta: Tensor
    """As the adapter's delta, with `k` columns."""

"""Originals to put back, and the one sum that takes their place in the weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paca.columns.state import AdapterColumns
from paca.functional.column_blocks import put_columns, read_columns


class Kept(NamedTuple):
    """Values of some columns of a weight, and where they belong. They may lie on another device than the weight."""

    positions: Tensor  # (k,) int64, sorted and unique: a copy, since an adapter's indices may be loaded over
    values: Tensor  # (out_features, k) or (k, out_features), as the weight is stored, in its dtype

    @classmethod
    def of(cls, weight: Tensor, dim: int, positions: Tensor) -> Kept:
        """The columns at `positions`, which run along `dim`, on the weight's device."""
        positions = positions.to(weight.device, copy=True)
        return cls(positions, read_columns(weight.detach(), dim, positions))

    def put_into(self, weight: Tensor, dim: int) -> None:
        """Write the values where they belong."""
        put_columns(weight, dim, self.positions.to(weight.device), self.values)

    def equal(self, other: Tensor) -> bool:
        """Whether `other`, of the same columns, has the same bits (NaN is equal to itself)."""
        bits = getattr(torch, f"int{8 * other.element_size()}")
        return torch.equal(self.values.to(other).view(bits), other.view(bits))


def holds(weight: Tensor, dim: int, originals: Iterable[Kept], columns: tuple[AdapterColumns, ...]) -> bool:
    """Whether the places of `originals` in the weight hold `columns` over them, or the originals for none."""
    now = ((kept, read_columns(weight.detach(), dim, kept.positions.to(weight.device))) for kept in originals)
    return all(Kept(kept.positions, values).equal(sum_of(kept, columns, dim).to(values)) for kept, values in now)


def sum_of(kept: Kept, columns: tuple[AdapterColumns, ...], dim: int) -> Tensor:
    """`W0 + sum_a scale_a * scatter(delta_a, indices_a)` at the kept positions, in float32 (float64 for float64).
    `columns` may have other positions as well. Where several have one, they are added in order."""
    positions, values, wide = *kept, torch.promote_types(kept.values.dtype, torch.float32)
    parts = tuple(part for c in columns for part in c.parts())
    if len(parts) == 1 and parts[0].indices.shape == positions.shape and parts[0].delta.device == values.device:
        return add_scaled([values], [oriented(parts[0].delta.detach(), dim).to(wide)], parts[0].scale)[0]
    total = values.to(wide, copy=True)
    along = [1] * total.dim()
    along[dim] = -1
    for part in parts:
        indices = part.indices.to(positions.device)
        # Without looking at values: that would wait for the device, and this runs after each step.
        places = torch.searchsorted(indices, positions).clamp_(max=indices.numel() - 1)
        here = (indices[places] == positions).to(total.device).view(along)
        delta = oriented(part.delta.detach(), dim)
        delta = delta.index_select(dim, places.to(delta.device)).to(total)
        total = torch.where(here, add_scaled([total], [delta], part.scale)[0], total)
    return total


def add_scaled(originals: Sequence[Tensor], deltas: Sequence[Tensor], scale: float) -> tuple[Tensor, ...]:
    """`W0 + scale * delta` for many columns at once, in the wider dtype of both."""
    return torch._foreach_add(list(originals), list(deltas), alpha=scale)


def oriented(delta: Tensor, dim: int) -> Tensor:
    """A delta as the weight is stored, so that `dim` runs over its columns."""
    return delta if dim in (1, -1) else delta.mT


def positions_of(columns: tuple[AdapterColumns, ...], device: torch.device) -> Tensor:
    """The places of all columns, `(k,)`, sorted and unique, on `device`."""
    if len(columns) == 1:
        return columns[0].indices.to(device)
    return torch.cat([c.indices.to(device) for c in columns]).unique(sorted=True)

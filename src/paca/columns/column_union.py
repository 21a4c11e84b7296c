"""What an adapter has trained, as a whole and in its two parts: the columns it trains now, and those folded before.

Plain tensors in and out, on the CPU. The union of both parts is what an adapter's file holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paca.columns.folded import Folded
from paca.columns.merging import common


class ColumnUnion(NamedTuple):
    """All columns of an adapter in one layer."""

    indices: Tensor  # (k,) int64, ascending
    delta: Tensor  # as the adapter's delta, with k columns


def union_of(indices: Tensor, delta: Tensor, folded: Folded | None, column_dim: int) -> ColumnUnion:
    """The columns trained now together with the folded ones, on the CPU; no value is changed.

    The deltas have their columns along `column_dim`: 1, or 2 for a stack of experts.
    """
    indices, delta = indices.detach().cpu(), delta.detach().cpu()
    if folded is None:
        return ColumnUnion(indices, delta)
    together = torch.cat([folded.indices, indices])
    order = together.argsort()
    return ColumnUnion(together[order], torch.cat([folded.delta, delta], column_dim).index_select(column_dim, order))


def split(union: ColumnUnion, trained: Tensor, column_dim: int) -> tuple[Tensor, Folded | None]:
    """Divide `union` into the columns `trained (r,)` and the others.

    Returns:
        The delta of `trained` (zero for columns that are not in the union), and the others as folded columns.
    """
    here, there = common(trained, union.indices)
    shape = list(union.delta.shape)
    shape[column_dim] = trained.numel()
    delta = union.delta.new_zeros(shape)
    delta.index_copy_(column_dim, here, union.delta.index_select(column_dim, there))
    rest = torch.ones(union.indices.shape, dtype=torch.bool)
    rest[there] = False
    places = rest.nonzero().flatten()
    if not places.numel():
        return delta, None
    return delta, Folded(union.indices[places], union.delta.index_select(column_dim, places))


def trained_of(union: Tensor, trained: Tensor) -> Tensor:
    """Which `r` columns of a loaded `union (k,)` to go on with: those trained now, as far as it has them.

    The others of `trained (r,)` were never trained by the loaded adapter; columns of it take their places.
    """
    have = torch.isin(union, trained)
    chosen = torch.cat([union[have], union[~have][: trained.numel() - int(have.sum())]])
    return chosen.sort().values

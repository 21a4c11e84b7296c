"""Folded columns: those that an adapter trained before others took their turn (`paca.rotate`).

An adapter's file holds the union of them with the columns that it trains now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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


class _OnTheWay:
    """`torch.distributed.checkpoint.state_dict` follows each name of a state dict through attributes, and uses none."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_fqn_modifiers":
            raise AttributeError(name)
        return self


def let_names_be_followed(deltas: nn.Module, indices: nn.Module) -> None:
    """Give a layer's two dictionaries what the names of its folded columns pass."""
    for holder, name in ((deltas, FOLDED_DELTA), (indices, FOLDED_INDICES)):
        setattr(holder, name.partition(".")[2], _OnTheWay())


class ColumnUnion(NamedTuple):
    """All columns of an adapter, or of several, in one layer."""

    indices: Tensor  # (k,) int64, ascending
    delta: Tensor  # as the adapter's delta, with k columns


def union_of(indices: Tensor, delta: Tensor, folded: Folded | None, column_dim: int) -> ColumnUnion:
    """The columns trained now together with the folded ones, on the CPU; no value is changed.

    The deltas (or a weight's own values there) have their columns along `column_dim`: 1, or -1 for a stack of experts.
    """
    indices, delta = indices.detach().cpu(), delta.detach().cpu()
    if folded is None:
        return ColumnUnion(indices, delta)
    together = torch.cat([folded.indices, indices])
    order = together.argsort()
    return ColumnUnion(together[order], torch.cat([folded.delta, delta], column_dim).index_select(column_dim, order))


def split(union: ColumnUnion, trained: Tensor, column_dim: int) -> tuple[Tensor, Folded | None]:
    """Divide `union` into the delta of the columns `trained (r,)` (zero for columns that are not in it), and the others
    as folded columns."""
    here, there = common(trained, union.indices)
    shape = list(union.delta.shape)
    shape[column_dim] = trained.numel()
    delta = union.delta.new_zeros(shape)
    delta.index_copy_(column_dim, here, union.delta.index_select(column_dim, there))
    places = (~torch.isin(union.indices, trained)).nonzero().flatten()
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


def common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the values are that two sorted, unique `(k,)` have in common: places in `first`, and in `second`."""
    places = torch.searchsorted(second, first).clamp_(max=second.numel() - 1)
    here = (second[places] == first).nonzero().flatten()
    return here, places[here]

"""Folded columns in a weight: what an adapter trained before its columns were rotated, beneath those it trains now.

Their pretrained values and their deltas lie on the CPU, so that a rotation leaves nothing on the device. They pass
through it piece by piece when an adapter is put into a weight or taken out of it, and not in a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from paca.columns.state import Columns
from paca.functional.column_blocks import read_columns
from paca.functional.rounding import add_once, round_once

_VALUES_AT_ONCE = 2**20  # of a weight on their way from and to the CPU: a few MiB


class Kept(NamedTuple):
    """Original columns, to be put back."""

    positions: Tensor  # (k,) int64, sorted and unique: a copy, since an adapter's indices may be loaded over
    values: Tensor  # (out_features, k) or (k, out_features), in the weight's dtype


Put = Callable[[Tensor, Tensor, Tensor], None]
"""Writes ``(weight, positions (k,), values)``."""


def parts_of(columns: tuple[Columns, ...]) -> tuple[Columns, ...]:
    """The adapters' trained columns, and beside them the folded ones as columns of their own."""
    folded = (Columns(c.name, c.folded.delta, c.folded.indices, c.scale) for c in columns if c.folded is not None)
    return (*(c._replace(folded=None) for c in columns), *folded)


def oriented(delta: Tensor, input_dim: int) -> Tensor:
    """A delta in the weight's orientation, so that ``input_dim`` runs over its columns."""
    return delta if input_dim in (1, -1) else delta.mT


def common(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the values are that two sorted, unique ``(k,)`` have in common: places in ``first``, and in ``second``."""
    if not first.numel() or not second.numel():
        return first.new_empty(0), first.new_empty(0)
    places = torch.searchsorted(second, first).clamp_(max=second.numel() - 1)
    here = (second[places] == first).nonzero().flatten()
    return here, places[here]


def sum_of_parts(kept: Kept, parts: tuple[Columns, ...], dtype: torch.dtype, input_dim: int) -> Tensor:
    """``round(W0 + sum_a scale_a * scatter(delta_a, indices_a))`` at the kept positions, on their device.

    A column of one part only is computed as it is where that part is alone, so to the same bits; columns that parts
    share are summed in float64 (float32 on devices without it). Everything is rounded once.

    Args:
        kept: original columns, which need not be all that the parts have.
        parts: without folded columns (``parts_of``).
        dtype: of the weight.
        input_dim: the dimension of ``kept.values`` that runs over the columns.
    """
    device = kept.values.device
    originals = kept.values.to(dtype)
    result = originals.clone()
    count = torch.zeros(kept.positions.shape, dtype=torch.int64, device=device)
    found: list[tuple[Tensor, Tensor, float]] = []
    for part in parts:
        here, there = common(kept.positions, part.indices.to(device))
        if here.numel():
            delta = oriented(part.delta.detach(), input_dim)
            delta = delta.index_select(input_dim, there.to(delta.device)).to(device)
            sums = add_once(originals.index_select(input_dim, here), delta, part.scale)
            result.index_copy_(input_dim, here, sums)
            count[here] += 1
            found.append((here, delta, part.scale))
    shared = (count > 1).nonzero().flatten()
    if shared.numel():
        total = originals.index_select(input_dim, shared).to(torch.float32 if device.type == "mps" else torch.float64)
        for here, delta, scale in found:
            places, inside = common(shared, here)
            total.index_add_(input_dim, places, delta.index_select(input_dim, inside).to(total.dtype), alpha=scale)
        result.index_copy_(input_dim, shared, round_once(total, dtype))
    return result


class FoldsInWeight:
    """The folded columns that one weight holds. Part of ``ResidentColumns``, which says when they come and go.

    Args:
        input_dim: the dimension of the weight that runs over the input features.
    """

    def __init__(self, input_dim: int) -> None:
        self.input_dim = input_dim
        self._holders: tuple[Columns, ...] = ()  # the adapters whose folded columns the weight holds
        self._originals: Kept | None = None  # on the CPU

    def are_those_of(self, columns: tuple[Columns, ...]) -> bool:
        """Whether the weight holds the folded columns of these adapters, by their scales, and no others."""
        wanted = [c for c in columns if c.folded is not None]
        return len(wanted) == len(self._holders) and all(
            a.folded is b.folded and a.scale == b.scale for a, b in zip(wanted, self._holders, strict=True)
        )

    def put_in(self, weight: Tensor, columns: tuple[Columns, ...], put: Put) -> None:
        """Write the folded columns of these adapters into the weight, which holds none, and keep its own."""
        holders = tuple(c for c in columns if c.folded is not None)
        if not holders:
            return
        parts = parts_of(holders)[len(holders) :]
        positions = torch.cat([part.indices for part in parts]).unique(sorted=True)
        originals = []
        for piece in self._pieces(weight, positions):
            kept = self._taken(weight, piece)
            originals.append(kept.values.cpu())
            put(weight, kept.positions, sum_of_parts(kept, parts, weight.dtype, self.input_dim))
        self._holders, self._originals = holders, Kept(positions, torch.cat(originals, self.input_dim))

    def take_out(self, weight: Tensor, put: Put) -> None:
        """Put the weight's own columns back, bit for bit."""
        if self._originals is None:
            return
        positions, values = self._originals
        size = self._piece_size(weight)
        for piece, part in zip(positions.split(size), values.split(size, self.input_dim), strict=True):
            put(weight, piece, part)
        self.forget()

    def forget(self) -> None:
        """Note that the weight is its own again."""
        self._holders, self._originals = (), None

    def with_originals(self, kept: Kept) -> Kept:
        """``kept``, read from the weight, with its original values where folded columns are in the weight."""
        if self._originals is None:
            return kept
        here, there = common(kept.positions.cpu(), self._originals.positions)
        if here.numel():
            values = self._originals.values.index_select(self.input_dim, there).to(kept.values)
            kept.values.index_copy_(self.input_dim, here.to(kept.values.device), values)
        return kept

    def rotate(self, weight: Tensor, kept: Kept, after: Columns) -> Kept:
        """Let the adapter, whose trained columns' originals are ``kept``, train those of ``after`` from now on.

        The weight, which holds this adapter alone, is not written.

        Returns:
            The originals of the columns that are trained now.
        """
        positions, values = kept.positions.cpu(), kept.values.cpu()
        if self._originals is not None:
            positions = torch.cat([self._originals.positions, positions])
            values = torch.cat([self._originals.values.to(values.dtype), values], self.input_dim)
        order = positions.argsort()
        known = Kept(positions[order], values.index_select(self.input_dim, order))
        self._originals = known
        now = self.with_originals(self._taken(weight, after.indices.cpu()))
        stay = torch.ones(known.positions.shape, dtype=torch.bool)
        stay[common(now.positions.cpu(), known.positions)[1]] = False
        places = stay.nonzero().flatten()
        self.forget()
        if after.folded is not None:
            self._holders = (after,)
            self._originals = Kept(known.positions[places], known.values.index_select(self.input_dim, places))
        return now

    def are_in(self, weight: Tensor, covered: Tensor) -> bool:
        """Whether the weight has the values of the folded columns, but for positions that trained ones cover."""
        if self._originals is None:
            return True
        parts, covered = parts_of(self._holders)[len(self._holders) :], covered.cpu()
        size = self._piece_size(weight)
        for piece, values in zip(
            self._originals.positions.split(size),
            self._originals.values.split(size, self.input_dim),
            strict=True,
        ):
            now = self._taken(weight, piece)
            wanted = sum_of_parts(Kept(now.positions, values.to(now.values)), parts, now.values.dtype, self.input_dim)
            free = torch.ones(piece.shape, dtype=torch.bool)
            free[common(covered, piece)[1]] = False
            places = free.nonzero().flatten().to(weight.device)
            if not torch.equal(
                now.values.index_select(self.input_dim, places), wanted.index_select(self.input_dim, places)
            ):
                return False
        return True

    def are_out_of(self, weight: Tensor) -> bool:
        """Whether the weight has its own values where the folded columns were."""
        if self._originals is None:
            return True
        now = self._taken(weight, self._originals.positions).values.cpu()
        return torch.equal(now, self._originals.values.to(now))

    def _pieces(self, weight: Tensor, positions: Tensor) -> Iterator[Tensor]:
        yield from positions.split(self._piece_size(weight))

    def _piece_size(self, weight: Tensor) -> int:
        return max(1, _VALUES_AT_ONCE * weight.shape[self.input_dim] // max(1, weight.numel()))

    def _taken(self, weight: Tensor, positions: Tensor) -> Kept:
        positions = positions.to(weight.device, copy=True)
        return Kept(positions, read_columns(weight.detach(), self.input_dim, positions))

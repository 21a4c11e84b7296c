"""A weight's own values beneath folded columns: there may be many, so they lie on the CPU, and pass in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from paca.columns.kept import Kept, positions_of, sum_of
from paca.columns.state import AdapterColumns
from paca.functional.column_blocks import put_columns

_VALUES_AT_ONCE = 2**20  # of a weight on their way from and to the CPU: a few MiB


def originals_of_folded(weight: Tensor, dim: int, columns: tuple[AdapterColumns, ...]) -> Kept:
    """The values of `weight` where `columns` have folded ones."""
    kept = Kept.of(weight, dim, positions_of(_folded(columns), weight.device))
    return Kept(kept.positions.cpu(), kept.values.cpu())


def put_folded(originals: Kept, weight: Tensor, dim: int, columns: tuple[AdapterColumns, ...]) -> None:
    """Write the sums of `columns` where `originals` are from."""
    for piece in pieces(originals, weight, dim):
        put_columns(weight, dim, piece.positions, sum_of(piece, columns, dim))


def pieces(kept: Kept, weight: Tensor, dim: int) -> Iterator[Kept]:
    """Kept columns of `weight` a few at a time, on its device."""
    size = max(1, _VALUES_AT_ONCE * weight.shape[dim] // max(1, weight.numel()))
    for some, of_them in zip(kept.positions.split(size), kept.values.split(size, dim), strict=True):
        yield Kept(some.to(weight.device), of_them.to(weight.device))


def _folded(columns: tuple[AdapterColumns, ...]) -> tuple[AdapterColumns, ...]:
    return tuple(part for c in columns for part in c.parts()[1:])

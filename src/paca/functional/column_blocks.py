"""Columns that lie side by side: copied as blocks, which is many times faster than one by one.

Each row of a weight is elsewhere in memory. One by one, 16 columns touch up to 16 cache lines of it; side by side, one
or two, and they move by vector instructions (numbers: docs/notes/speed.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""First column and length of each run of neighbours, in the order of the indices."""

_MEAN_LENGTH = 8
"""Shorter runs, on average, are not worth a copy each."""


def runs_of(indices: Tensor) -> Runs | None:
    """The runs that ``indices (k,)`` int64 consist of, or None if they are better taken one by one.

    On accelerators always None: looking at the values would wait for the device, where both ways take as long.
    """
    count = indices.numel()
    if indices.device.type != "cpu" or type(indices) is not Tensor or count < _MEAN_LENGTH:
        return None
    most = count // _MEAN_LENGTH
    runs: list[tuple[int, int]] = []
    first = previous = -2
    for column in indices.tolist():
        if column != previous + 1:
            if len(runs) == most:
                return None
            runs.append((column, 1))
            first = column
        else:
            runs[-1] = (first, column - first + 1)
        previous = column
    return tuple(runs)


def take_columns(x: Tensor, indices: Tensor, runs: Runs | None) -> Tensor:
    """``x.index_select(-1, indices)``: a copy, ``(..., k)``.

    Args:
        x: any shape.
        indices: ``(k,)`` int64.
        runs: ``runs_of(indices)``.
    """
    if runs is None:
        return x.index_select(-1, indices)
    if len(runs) == 1:
        return x.narrow(-1, *runs[0]).clone(memory_format=torch.contiguous_format)
    return torch.cat([x.narrow(-1, *run) for run in runs], -1)


def read_columns(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """``weight.index_select(dim, indices)``: a copy."""
    runs = runs_of(indices) if _is_plain(weight) else None
    if runs is None:
        return weight.index_select(dim, indices)
    return torch.cat([weight.narrow(dim, *run) for run in runs], dim)


def put_columns(weight: Tensor, dim: int, indices: Tensor, values: Tensor) -> None:
    """``weight.index_copy_(dim, indices, values)``."""
    runs = runs_of(indices) if _is_plain(weight) else None
    if runs is None:
        weight.index_copy_(dim, indices, values)
        return
    place = 0
    for first, length in runs:
        weight.narrow(dim, first, length).copy_(values.narrow(dim, place, length))
        place += length


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"

"""Columns that lie side by side: copied as blocks, which is many times faster than one by one. Each row of a weight is
elsewhere in memory: one by one, 16 columns touch up to 16 cache lines of it; side by side, one or two, and they move by
vector instructions (numbers: docs/notes/speed.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Runs = tuple[tuple[int, int], ...]
"""First column and length of each run of neighbours, in the order of the indices."""

_MEAN_LENGTH = 8
"""Shorter runs, on average, are not worth a copy each."""

_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # (version, runs): on accelerators, looking waits for the device


def version_of(tensor: Tensor, otherwise: int = -1) -> int:
    """The tensor's version counter; `otherwise` for inference tensors, which have none (and can't be trained)."""
    return otherwise if tensor.is_inference() else tensor._version


def runs_of(indices: Tensor) -> Runs | None:
    """The runs that `indices (k,)` int64 consist of, or None if they are better taken one by one. Looks
    at the values once for each version of the tensor."""
    if indices.numel() < _MEAN_LENGTH or type(indices) is not Tensor or indices.is_meta:
        return None
    version, known = version_of(indices), _KNOWN.get(indices)
    if known is None or known[0] != version or version == -1:
        known = _KNOWN[indices] = (version, _find_runs(indices.tolist()))
    runs: Runs | None = known[1]
    return runs


def _find_runs(columns: list[int]) -> Runs | None:
    starts = [n for n, column in enumerate(columns) if n == 0 or column != columns[n - 1] + 1]
    if len(starts) > len(columns) // _MEAN_LENGTH:
        return None
    return tuple((columns[n], end - n) for n, end in zip(starts, [*starts[1:], len(columns)], strict=True))


def take_columns(x: Tensor, indices: Tensor, runs: Runs | None, dim: int = -1) -> Tensor:
    """`x.index_select(dim, indices)` for `indices (k,)` with these `runs_of` them: a copy."""
    if runs is None:
        return x.index_select(dim, indices)
    if len(runs) == 1:
        return x.narrow(dim, *runs[0]).clone(memory_format=torch.contiguous_format)
    return torch.cat(blocks_of(x, dim, runs), dim)


def read_columns(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """`weight.index_select(dim, indices)`: a copy."""
    return take_columns(weight, indices, runs_of(indices) if _is_plain(weight) else None, dim)


def put_columns(weight: Tensor, dim: int, indices: Tensor, values: Tensor) -> None:
    """`weight.index_copy_(dim, indices, values)`, each rounded once to the weight's dtype; nothing is recorded."""
    runs = runs_of(indices) if _is_plain(weight) else None
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        if runs is None:
            weight.index_copy_(dim, indices, values.to(weight))
        else:
            for block, part in zip(blocks_of(weight, dim, runs), blocks_in(values, dim, runs), strict=True):
                block.copy_(part)


def blocks_of(weight: Tensor, dim: int, runs: Runs) -> list[Tensor]:
    """Views of the blocks of columns in `weight`, which run along `dim`."""
    return [weight.narrow(dim, *run) for run in runs]


def blocks_in(values: Tensor, dim: int, runs: Runs) -> list[Tensor]:
    """Views of the same blocks in a tensor that holds these columns only."""
    return [values] if len(runs) == 1 else list(values.split([length for _, length in runs], dim))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)

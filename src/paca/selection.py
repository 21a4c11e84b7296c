"""Which input columns of a weight are trained: ``(in_features, r, ...) -> indices``, sorted, unique, int64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def check_rank(r: int, in_features: int, module_name: str) -> None:
    """Raise ``ValueError`` unless ``1 <= r <= in_features``."""
    if not 1 <= r <= in_features:
        raise ValueError(
            f"{module_name}: r={r} columns were asked for, but this layer has {in_features} input columns. "
            f"Choose r between 1 and {in_features}, or give this layer its own rank in rank_pattern."
        )


def random_columns(in_features: int, r: int, seed: int, module_name: str) -> Tensor:
    """Draw ``r`` distinct columns uniformly, reproducibly from ``(seed, module_name)`` alone.

    Neither the global random state nor the order in which layers are made has any influence, so a model that is
    wrapped in parts, or in several processes, gets the same columns.

    Returns:
        ``(r,)`` int64, sorted, on CPU.
    """
    check_rank(r, in_features, module_name)
    digest = hashlib.sha256(f"{seed}:{module_name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.randperm(in_features, generator=generator, device="cpu")[:r]
    return drawn.sort().values


def explicit_columns(columns: Sequence[int] | Tensor, in_features: int, module_name: str) -> Tensor:
    """Check and sort columns that the user names.

    Returns:
        ``(r,)`` int64, sorted, on CPU.

    Raises:
        ValueError: if there are none, one is repeated, or one is outside ``[0, in_features)``.
    """
    indices = torch.as_tensor(columns, device="cpu")
    if indices.dim() != 1 or indices.numel() == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{module_name}: columns must be a non-empty list of whole numbers, got {columns!r}.")
    indices = indices.to(torch.int64).sort().values
    problem = column_problem(indices, in_features)
    if problem:
        raise ValueError(f"{module_name}: {problem}.")
    return indices


def column_problem(indices: Tensor, in_features: int) -> str | None:
    """Say what is wrong with ``indices (r,)``, or None: used for columns a user names and for those a file holds."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= in_features):
        wrong = indices[(indices < 0) | (indices >= in_features)]
        return f"column {int(wrong[0])} is out of range: this layer has columns 0 to {in_features - 1}"
    values, counts = indices.unique(return_counts=True)
    if values.numel() != indices.numel():
        return f"column {int(values[counts > 1][0])} is named more than once"
    return None

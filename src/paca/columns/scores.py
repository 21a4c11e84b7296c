"""Which input columns of a weight are trained, by scores or by hand: `r` indices, sorted, unique, int64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paca.columns.selection import check_rank, check_strategy, column_problem

_ROWS_AT_ONCE = 2**20  # values converted to float64 at a time


def select_columns(strategy: str, r: int, scores: Tensor, module_name: str) -> Tensor:
    """Choose the `r` columns `(r,)` of the module with the largest `scores (in_features,)`; of equal ones the first.
    Raise `ValueError` for an unknown strategy, a rank that the layer has not, or scores that are NaN or infinite."""
    check_strategy(strategy)
    check_rank(r, scores.numel(), module_name)
    on_cpu = scores.detach().to("cpu", torch.float64)
    wrong = (~on_cpu.isfinite()).nonzero().flatten()
    if wrong.numel():
        source = "weight holds" if strategy == "weight_norm" else "statistics over the batches hold"
        raise ValueError(
            f"{module_name}: its {source} NaN or infinite values ({wrong.numel()} columns, the first is "
            f"{int(wrong[0])}), so that {strategy} can't rank its columns. Check the weights and the batches; in "
            "float16, load the model in bfloat16 or float32."
        )
    return on_cpu.sort(descending=True, stable=True).indices[:r].sort().values


def weight_norms(weight: Tensor, input_dim: int) -> Tensor:
    """The Euclidean norm of each column, `(in_features,)`, over all dimensions but `input_dim`.

    In float64 (float32 where the device has no float64), computed piece by piece.
    """
    columns = weight.detach().movedim(input_dim, -1)  # (..., in_features)
    total = torch.zeros(columns.shape[-1], dtype=widest(weight.device), device=weight.device)
    for part in columns.split(max(1, _ROWS_AT_ONCE // max(1, columns[0].numel()))):
        total += part.to(total.dtype).square().flatten(0, -2).sum(0)
    return total.sqrt()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def explicit_columns(columns: Sequence[int] | Tensor, in_features: int, module_name: str) -> Tensor:
    """Check and sort columns that the user names: `(r,)` int64, on CPU; `ValueError` if they can't be a layer's."""
    try:
        indices = torch.as_tensor(columns, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # a string, None, lists of different lengths, numbers past int64
        indices = torch.empty(0)
    if indices.dim() != 1 or indices.numel() == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{module_name}: columns must be a non-empty list of whole numbers, got {columns!r}.")
    indices = indices.to(torch.int64).sort().values
    problem = column_problem(indices, in_features)
    if problem:
        raise ValueError(f"{module_name}: {problem}.")
    return indices

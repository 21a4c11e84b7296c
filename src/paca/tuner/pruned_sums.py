"""Sums of which each adapter keeps a share of its values only, by PEFT's names: TIES (arXiv 2306.01708) and DARE
(2311.03099). LoRA's two factors are pruned one by one; here it is the change of the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune

from paca.columns.folded import ColumnUnion

PRUNED: dict[str, tuple[Literal["magnitude", "random"], bool]] = {
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
"""Which values are kept, the largest or some at random (then scaled up), and whether the adapters vote on signs."""
Signs = Literal["total", "frequency"]


def check_pruning(combination_type: str, density: float | None, majority_sign_method: str) -> None:
    """Raise `ValueError` for settings with which nothing can be pruned."""
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if density is None or not number or not 0 < density <= 1:
        raise ValueError(
            f"combination_type={combination_type!r} needs density, the share of each adapter's values that is kept: "
            f"above 0, 1 at most; got {density!r}."
        )
    if majority_sign_method not in get_args(Signs):
        raise ValueError(
            f"majority_sign_method must be {' or '.join(map(repr, get_args(Signs)))}; got {majority_sign_method!r}."
        )


def pruned_sum(
    changes: Sequence[ColumnUnion],
    weights: Sequence[float],
    combination_type: str,
    density: float,
    majority_sign_method: Signs,
    column_dim: int,
) -> ColumnUnion:
    """The union of the columns, with the sum of what is kept of each adapter's change, times its weight.

    With a vote, a value counts where its sign is that of the sum of all (`"total"`) or of most (`"frequency"`), and
    what counts is averaged, not added up, as in PEFT.

    Args:
        changes: What each adapter adds to the weight, in its columns (along `column_dim`).
        weights: One per adapter.
        combination_type: One of `PRUNED`.
        density: The share of values that is kept.
        majority_sign_method: As `add_weighted_adapter` takes it.
        column_dim: Of the changes.
    """
    keep, votes = PRUNED[combination_type]
    union = torch.unique(torch.cat([change.indices for change in changes]))
    shape = list(changes[0].delta.shape)
    shape[column_dim] = union.numel()
    placed = []
    for change in changes:
        kept = prune(change.delta, density, keep, rescale=True) if density < 1 else change.delta
        places = torch.searchsorted(union, change.indices)
        placed.append(kept.new_zeros(shape).index_copy_(column_dim, places, kept))
    stacked = torch.stack(placed)
    weighted = torch.stack([part * weight for part, weight in zip(placed, weights, strict=True)])
    if not votes:
        return ColumnUnion(union, weighted.sum(0))
    return ColumnUnion(union, disjoint_merge(weighted, calculate_majority_sign_mask(stacked, majority_sign_method)))

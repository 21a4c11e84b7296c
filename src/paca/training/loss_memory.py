"""Whether training ever holds the logits of a whole batch: tokens x vocabulary, often the largest tensor of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def holds_all_logits(train: Mapping[str, Any]) -> bool:
    """Whether TRL's trainer (>= 1.16) computes the loss from all logits at once.

    It does for label smoothing alone. Otherwise its output head and its loss are one function that goes through the
    positions with a label in tiles of at most 4096 tokens by 32768 of the vocabulary, for ``loss_type: nll`` and
    ``dft``, on every device, and with Liger's kernels as well.

    Args:
        train: The section of a run's config.
    """
    return bool(train.get("label_smoothing_factor"))


def describe_logits(train: Mapping[str, Any]) -> str:
    """The same, in words."""
    if holds_all_logits(train):
        return "of a whole batch at once, because of train.label_smoothing_factor"
    return "tile by tile (TRL's fused output head), never of a whole batch at once"

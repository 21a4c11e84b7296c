"""A weight that stays as it is, as a layer would give it to a pass; and the columns of a pass, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.functional.column_blocks import runs_of
from paca.functional.product import Trained, WeightSource


class FixedWeight(WeightSource):
    """Gives the same weight in both passes, and notes the tags that the backward pass brings back."""

    def __init__(self, weight: Tensor | None, tag: int = 0) -> None:
        self.fixed, self.tag = weight, torch.tensor(tag)
        self.seen: list[int] = []

    def weight(self) -> Tensor:
        return self.fixed

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor:
        self.seen.append(int(saved_tag))
        return self.fixed


def columns(deltas, indices, scales, rows=None) -> Trained:
    """What a pass trains, with the blocks of `indices` as a layer finds them."""
    runs = tuple(runs_of(i) for i in indices)
    return Trained(tuple(deltas), tuple(indices), tuple(scales), runs, tuple(rows or (None,) * len(scales)))

"""A pass whose columns are added to what a layer computes: no weight holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.columns.state import ActiveColumns, State
from paca.functional.product import WeightSource


class AddedPass(WeightSource):
    """There is no weight, but the columns of `state` must stay as they are until the backward pass.

    `batch_tag` says which samples of a mixed batch have which adapter.
    """

    __slots__ = ("columns", "state", "tag")

    def __init__(self, columns: ActiveColumns, state: State, batch_tag: int | None = None) -> None:
        self.columns, self.state = columns, state
        self.tag = state.tag if batch_tag is None else torch.tensor(hash((state.key, batch_tag)), device="cpu")

    def weight(self) -> Tensor:
        raise AssertionError("columns are added to an output")

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> None:
        same = saved_tag is self.tag or int(saved_tag) == int(self.tag)
        self.columns.check_backward(self.state, self.state.tag if same else saved_tag)

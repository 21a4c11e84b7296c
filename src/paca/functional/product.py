"""What the one autograd function asks for: what a kind of layer computes, which columns, and where the weight is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from paca.functional.column_blocks import Runs


class Trained(NamedTuple):
    """The columns that one pass trains: one entry per adapter in each field."""

    deltas: tuple[Tensor, ...] = ()
    """`(out_features, r)` each, or what the product takes."""
    indices: tuple[Tensor, ...] = ()
    """`(r,)` int64 each, ascending."""
    scales: tuple[Any, ...] = ()
    """`paca_alpha / r` each: a float, or, within a compiled graph, a scalar tensor, so that it is no constant there."""
    runs: tuple[Runs | None, ...] = ()
    """`runs_of` each of `indices`; None where they are taken one by one."""
    rows: tuple[Tensor | None, ...] = ()
    """The samples that each adapter is for, int64; None for all. Only where columns are added."""


FACTORED: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""By the id of each delta that an optimizer steps as a product of two factors: what gives these (`factors_of`)."""


def factors_of(delta: Tensor) -> Any:
    """The `Factors` of a delta, whose gradients take the place of its own; None if it has none, or not of a matrix."""
    held = FACTORED.get(id(delta))
    return None if held is None else held.factors()


class Product(ABC):
    """What a kind of layer computes. Holds settings, no tensors of the layer."""

    reads_indices = False
    """Whether a delta's gradient needs the columns' numbers."""

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the stock module computes, with its own operators, so that results agree bitwise."""

    @abstractmethod
    def select(self, x: Tensor, indices: Tensor, runs: Runs | None) -> Tensor:
        """What the columns `indices (r,)` read of `x`: all that is kept of it."""

    @abstractmethod
    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        """The gradient of the input, of `input_size`, in `grad_output`'s dtype."""

    @abstractmethod
    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """The gradient of a delta of `size`, in `dtype`: `scale` times that of its columns."""

    def bias_gradient(self, grad_output: Tensor) -> Tensor:
        """`grad_output` summed over all but the output features."""
        return grad_output.reshape(-1, grad_output.shape[-1]).sum(0)

    # For columns that are added to what the stock module made; not every kind of layer needs them.

    def add_contribution(self, y: Tensor, selected: Tensor, indices: Tensor, delta: Tensor, scale: float) -> Tensor:
        """`y` and what the columns contribute to it, as a new tensor of `y`'s dtype."""
        raise NotImplementedError

    def add_input_gradient(
        self, grad_x: Tensor, grad_output: Tensor, indices: Tensor, delta: Tensor, scale: float
    ) -> None:
        """Add to `grad_x`, in place, what reaches the input through the added columns."""
        raise NotImplementedError


class WeightSource(ABC):
    """Where the weight of one forward pass comes from, and how its backward pass finds it again."""

    tag: Tensor
    """A scalar that stands for the columns this pass uses. It is saved with the activations, so that a pass repeated by
    activation checkpointing replaces it together with them."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight that the forward pass multiplies with; it holds the columns already."""

    @abstractmethod
    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor | None:
        """The same in the backward pass; None if it is not `wanted`, and the columns are only to be checked. Raise
        `RuntimeError` if they changed, or a repeated pass ran with others."""

    def check_after(self) -> None:  # noqa: B027  (few weights are written by other threads)
        """Raise `RuntimeError` if another thread wrote into the weight since `weight_again` gave it."""


def check_frozen(weight: Tensor) -> None:
    """Raise `ValueError` if the weight of an adapted layer requires grad."""
    if weight.requires_grad:
        raise ValueError(
            "The weight of an adapted layer requires grad, but PaCA trains its columns only: the rest of the weight "
            "would get no gradient. Call weight.requires_grad_(False), or train the layer whole through "
            "modules_to_save instead of target_modules."
        )

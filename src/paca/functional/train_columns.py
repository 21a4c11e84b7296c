"""The one autograd function: a product of which only some columns of the weight are trained (design, section 3).

Forward and backward run on plain tensor operators, eager and under `torch.compile` alike. What differs between layers
is the `Product`; where the weight comes from is the `WeightSource`. A formula stands once: the stock product, what is
kept of the input, the input's gradient, a delta's gradient and a column's contribution are all the product's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional.column_blocks import Runs

HALF_DTYPES = (torch.float16, torch.bfloat16)


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

    @property
    @abstractmethod
    def tag(self) -> Tensor:
        """A scalar tensor that stands for the columns this pass uses. It is saved with the activations, so that a pass
        repeated by activation checkpointing replaces it together with them."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight that the forward pass multiplies with; it holds the columns already."""

    @abstractmethod
    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor | None:
        """The same in the backward pass; None if it is not `wanted`, and the columns are only to be checked.

        Raises:
            RuntimeError: if the columns are not the same any more, or a repeated pass ran with others.
        """


def train_columns(
    product: Product,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    trained: Trained,
    source: WeightSource | None = None,
    added_to: Tensor | None = None,
) -> Tensor:
    """Apply a weight to `x`, and send gradients to `x`, `bias` and the deltas of the trained columns.

    Args:
        product: of the kind of layer.
        x: the layer's input, any strides, may be empty.
        weight: already holds the trained columns. Autograd checks its version: if it is written before the backward
            pass, that raises. None if `source` gives it, or if columns are added.
        bias: or None. Gets a gradient if it requires one.
        trained: the columns; may be none.
        source: gives the weight in the forward pass, and again in the backward pass.
        added_to: the output of a layer whose weight does not hold the columns: their contribution is added to it. Then
            `source` only checks, in the backward pass, that the columns are the same.

    Returns:
        What the stock module returns for such a weight; `added_to`'s dtype if that is given.

    Raises:
        ValueError: if `weight` requires grad.
    """
    if weight is not None:
        check_frozen(weight)
    deltas, indices, *settings = trained
    # Few arguments: torch looks at each of them.
    return _TrainColumns.apply((product, source, *settings), x, weight, bias, added_to, *indices, *deltas)


def check_frozen(weight: Tensor) -> None:
    """Raise `ValueError` if the weight of an adapted layer requires grad."""
    if weight.requires_grad:
        raise ValueError(
            "The weight of an adapted layer requires grad, but PaCA trains its columns only: the rest of the weight "
            "would get no gradient. Call weight.requires_grad_(False), or train the layer whole through "
            "modules_to_save instead of target_modules."
        )


class _TrainColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        added_to: Tensor | None,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        product, source, scales, runs, rows = settings
        count = len(scales)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        needed = ctx.needs_input_grad[5 + count :]
        # Select first: x was just written, and the matmul would drive it out of cache. And before the cast: under
        # autocast that reads r columns of x instead of casting all of it.
        selected: list[Any] = [
            product.select(x, i, run) if need or added_to is not None else None
            for i, run, need in zip(indices, runs, needed, strict=True)
        ]
        if added_to is None:
            y: Any = product.apply(x, source.weight() if source is not None else weight, bias)
            if not torch.compiler.is_compiling() and y._is_view():  # autograd forbids to write into views
                y = torch.ops.aten._unsafe_view(y, y.shape)
            selected = [s if s is None else in_dtype(s, y.dtype) for s in selected]
        else:
            # Hooks and autograd may hold it: it is not written.
            y = added_to.clone() if count == 0 or any(r is not None for r in rows) else added_to
            with torch.autocast(y.device.type, enabled=False):
                for n, (i, delta) in enumerate(zip(indices, deltas, strict=True)):
                    selected[n] = part = in_dtype(of_rows(selected[n], rows[n]), y.dtype)
                    sums = product.add_contribution(of_rows(y, rows[n]), part, i, delta, scales[n])
                    y = sums if rows[n] is None else y.index_copy_(0, rows[n], sums)
        ctx.product, ctx.source, ctx.scales, ctx.rows, ctx.needed = product, source, scales, rows, needed
        ctx.input_size, ctx.input_dtype, ctx.compute_dtype = x.shape, x.dtype, y.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.deltas = [(d.shape, d.dtype) for d in deltas]
        ctx.adds, ctx.indices, ctx.added = added_to is not None, (None,) * count, deltas if added_to is not None else ()
        selected = [s for s, need in zip(selected, needed, strict=True) if need]
        if source is not None:
            ctx.indices = indices  # whether they are the same in the backward pass is the source's to check
            ctx.save_for_backward(source.tag, *selected)
        elif product.reads_indices:
            ctx.save_for_backward(weight, *selected, *indices)
        else:
            ctx.save_for_backward(weight, *selected)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_autocast_enabled(grad_output.device.type):
            with torch.autocast(grad_output.device.type, enabled=False):
                return _gradients(ctx, grad_output)
        return _gradients(ctx, grad_output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    first, *saved = ctx.saved_tensors
    multiplies = ctx.needs_input_grad[1] and not ctx.adds
    weight = first if ctx.source is None else ctx.source.weight_again(first, multiplies)
    product, count = ctx.product, len(ctx.scales)
    indices = saved[-count:] if ctx.source is None and count and product.reads_indices else ctx.indices
    needs_x, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    grad_y = in_dtype(grad_output, ctx.compute_dtype)
    # Columns first: grad_y was just written, and the large matmul would drive it out of cache.
    grad_deltas: list[Tensor | None] = []
    remaining = iter(saved)
    for n, need in enumerate(ctx.needed):
        grad_deltas.append(
            product.delta_gradient(
                next(remaining), of_rows(grad_y, ctx.rows[n]), indices[n], ctx.scales[n], *ctx.deltas[n]
            )
            if need
            else None
        )
    grad_bias = product.bias_gradient(grad_y).to(ctx.bias_dtype) if needs_bias else None
    grad_x = None
    if multiplies:
        grad_x = in_dtype(product.input_gradient(grad_y, weight, ctx.input_size), ctx.input_dtype)
    elif needs_x:
        grad_x = grad_y.new_zeros(ctx.input_size)
        for n, delta in enumerate(ctx.added):
            part = grad_x if ctx.rows[n] is None else of_rows(grad_x, ctx.rows[n])
            product.add_input_gradient(part, of_rows(grad_y, ctx.rows[n]), indices[n], delta, ctx.scales[n])
            if ctx.rows[n] is not None:
                grad_x.index_copy_(0, ctx.rows[n], part)
        grad_x = in_dtype(grad_x, ctx.input_dtype)
    grad_added_to = grad_output if ctx.adds else None
    return None, grad_x, None, grad_bias, grad_added_to, *([None] * count), *grad_deltas


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without its microsecond where there is nothing to do; tokens stay whole numbers."""
    return tensor if tensor.dtype == dtype or not tensor.is_floating_point() else tensor.to(dtype)


def of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The samples `rows` of `tensor (samples, ...)`; all for None."""
    return tensor if rows is None else tensor.index_select(0, rows)


def scaled(gradient: Tensor, scale: Any) -> Tensor:
    """`gradient`, which nobody else holds, times `scale`."""
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient.mul_(scale)

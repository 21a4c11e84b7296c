"""The one autograd function: a product of which only some columns of the weight are trained (design, section 3).
Forward and backward run on plain tensor operators, eager and under `torch.compile` alike. What differs between layers
is the `Product`; where the weight comes from is the `WeightSource`. A formula stands once: the stock product, what is
kept of the input, the input's gradient, a delta's gradient and a column's contribution are all the product's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paca.functional.added import add_contributions, input_gradient_of_added, of_rows
from paca.functional.first_order import first_order
from paca.functional.product import FACTORED, Product, Trained, WeightSource, check_frozen, factors_of


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
        x: The layer's input, any strides, may be empty.
        weight: Already holds the trained columns. Without a `source` autograd checks its version: if it is written
            before the backward pass, that raises. None if `source` gives it, or if columns are added.
        source: Gives the weight in the backward pass, and, if `weight` is None, in the forward pass.
        added_to: The output of a layer whose weight does not hold the columns: their contribution is added to it. Then
            `source` only checks, in the backward pass, that the columns are the same.
    """
    if weight is not None and weight.requires_grad:
        check_frozen(weight)
    deltas, indices, *settings = trained
    if weight is not None and source is None and not any(t.requires_grad for t in (x, *deltas, bias) if t is not None):
        return product.apply(x, weight, bias)  # Dynamo can't trace a function of which nothing needs a gradient
    return _TrainColumns.apply((product, source, *settings), x, weight, bias, added_to, *indices, *deltas)


class _TrainColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Any, x: Tensor, weight: Any, bias: Any, added_to: Any, *indices_then_deltas: Tensor
    ) -> Tensor:
        product, source, scales, runs, rows = settings
        count, adds = len(scales), added_to is not None
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        needed = ctx.needs_input_grad[5 + count :]
        # Select first: x was just written, and the matmul would drive it out of cache. And before the cast: under
        # autocast that reads r columns of x instead of casting all of it.
        selected: list[Any] = [
            product.select(x, i, run) if need or adds else None
            for i, run, need in zip(indices, runs, needed, strict=True)
        ]
        if adds:
            y: Any = add_contributions(product, added_to, selected, indices, deltas, scales, rows)
        else:
            y = product.apply(x, source.weight() if source is not None and weight is None else weight, bias)
            eager = source is not None or not torch.compiler.is_compiling()
            if eager and y._is_view():  # autograd forbids to write into views
                y = torch.ops.aten._unsafe_view(y, y.shape)
            selected = [s if s is None or s.dtype == y.dtype else in_dtype(s, y.dtype) for s in selected]
        ctx.product, ctx.source, ctx.scales, ctx.rows, ctx.needed = product, source, scales, rows, needed
        ctx.input_size, ctx.input_dtype, ctx.compute_dtype = x.shape, x.dtype, y.dtype
        ctx.bias_dtype, ctx.deltas = None if bias is None else bias.dtype, [(d.shape, d.dtype) for d in deltas]
        ctx.adds, ctx.indices, ctx.added, ctx.makers = adds, (None,) * count, deltas, [product] * count
        if source is not None and FACTORED:
            ctx.makers = [(need and factors_of(d)) or product for d, need in zip(deltas, needed, strict=True)]
        selected = [s for s, need in zip(selected, needed, strict=True) if need]
        if source is not None:
            ctx.indices = indices  # whether they are the same in the backward pass is the source's to check
            ctx.save_for_backward(source.tag, *selected)
        else:
            ctx.save_for_backward(weight, *selected, *(indices if product.reads_indices else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            ctx.makers = [ctx.product] * len(ctx.scales)
            return first_order(_TrainColumns.backward)(ctx, grad_output)
        if torch.is_autocast_enabled(grad_output.device.type):
            with torch.autocast(grad_output.device.type, enabled=False):
                return _gradients(ctx, grad_output)
        return _gradients(ctx, grad_output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    first, *saved = ctx.saved_tensors
    needs_x, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    multiplies = needs_x and not ctx.adds
    weight = first if ctx.source is None else ctx.source.weight_again(first, multiplies)
    product, count = ctx.product, len(ctx.scales)
    indices = saved[-count:] if ctx.source is None and count and product.reads_indices else ctx.indices
    grad_y = grad_output if grad_output.dtype == ctx.compute_dtype else in_dtype(grad_output, ctx.compute_dtype)
    # Columns first: grad_y was just written, and the large matmul would drive it out of cache.
    grad_deltas: list[Tensor | None] = [None] * count
    kept = iter(saved)
    for n, need in enumerate(ctx.needed):
        if need:
            part = grad_y if ctx.rows[n] is None else of_rows(grad_y, ctx.rows[n])
            grad_deltas[n] = ctx.makers[n].delta_gradient(next(kept), part, indices[n], ctx.scales[n], *ctx.deltas[n])
    grad_bias = product.bias_gradient(grad_y).to(ctx.bias_dtype) if needs_bias else None
    grad_x = None
    if multiplies:
        grad_x = product.input_gradient(grad_y, weight, ctx.input_size)
        if ctx.source is not None:
            ctx.source.check_after()
    elif needs_x:
        grad_x = input_gradient_of_added(product, grad_y, ctx.input_size, indices, ctx.added, ctx.scales, ctx.rows)
    grad_x = None if grad_x is None else in_dtype(grad_x, ctx.input_dtype)
    return None, grad_x, None, grad_bias, grad_output if ctx.adds else None, *([None] * count), *grad_deltas


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without its microsecond where there is nothing to do; tokens stay whole numbers."""
    return tensor if tensor.dtype == dtype or not tensor.is_floating_point() else tensor.to(dtype)


def scaled(gradient: Tensor, scale: Any) -> Tensor:
    """`gradient`, which nobody else holds, times `scale`."""
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient.mul_(scale)

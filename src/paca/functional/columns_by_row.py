"""Columns of several adapters on top of a pretrained layer, each for its own samples: plain tensors in and out.

The weight can hold one set of columns at a time, so for a mixed batch it holds none: it is the pretrained one, and each
adapter's rows get what its columns contribute on top. For a linear layer that is ``scale * x[..., indices] @ delta.T``:
one gather and one skinny GEMM per adapter. Other kinds of layers bring a product of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional.linear import column_gradient


class RowColumns(NamedTuple):
    """The trained columns of one adapter, and the samples they are for."""

    rows: Tensor
    """``(samples of this adapter,)`` int64; no two adapters share one."""
    delta: Tensor
    """``(out_features, r)``, or what the product takes."""
    indices: Tensor
    """``(r,)`` int64."""
    scale: float


class RowProduct(ABC):
    """What some rows' columns contribute to a layer's output, and the gradients of that."""

    @abstractmethod
    def select(self, x: Tensor, rows: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """What the columns read of ``x``, and all that is kept of it; in ``dtype``, the output's, if it is a float."""

    @abstractmethod
    def add(self, y: Tensor, selected: Tensor, group: RowColumns) -> None:
        """Add the group's contribution to its rows of ``y``, in place."""

    @abstractmethod
    def delta_gradient(
        self, selected: Tensor, grad_rows: Tensor, indices: Tensor, scale: float, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """The gradient of a delta of ``size``, in ``dtype``, from ``grad_rows``, the output's gradient of its rows."""

    def add_input_gradient(self, grad_x: Tensor, grad_rows: Tensor, group: RowColumns) -> None:
        """Put the group's contribution into ``grad_x``, which has zeros in its rows."""
        raise NotImplementedError  # for products whose input has no gradient


def add_columns_by_row(
    y: Tensor,
    x: Tensor,
    groups: Sequence[RowColumns],
    product: RowProduct | None = None,
    *,
    batch_tag: int = 0,
    after_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Add what each of ``groups`` contributes to its rows of ``y``.

    Args:
        y: ``(samples, ..., out_features)``, what the pretrained weight gives. Without autograd it is written in place.
        x: ``(samples, ..., in_features)``, two dimensions or more; or what the product takes.
        groups: the adapters' columns with their samples.
        product: of the kind of layer; default: ``LinearProduct``.
        batch_tag: names which sample runs with what, so that a forward pass that activation checkpointing repeats for
            other samples is noticed.
        after_backward: called when gradients were computed: an optimizer step may follow.

    Returns:
        Like ``y``, in its dtype. Samples of no group are ``y``'s, bit for bit. Gradients go to ``y``, ``x`` and each
        ``delta`` (from its own samples only).
    """
    product = product or LinearProduct()
    if not torch.is_grad_enabled():
        for group in groups:
            product.add(y, product.select(x, group.rows, group.indices, y.dtype), group)
        return y
    content = (batch_tag, *((id(g.delta), id(g.indices), g.scale) for g in groups))
    tag = torch.tensor(hash(content), dtype=torch.int64, device="cpu")
    scales = tuple(group.scale for group in groups)
    tensors = [tensor for group in groups for tensor in (group.rows, group.delta, group.indices)]
    return _AddColumnsByRow.apply(y, x, product, scales, after_backward, tag, *tensors)


class LinearProduct(RowProduct):
    """``scale * x[..., indices] @ delta.T``, in ``y``'s dtype and, where the backend can, added before the rounding."""

    def select(self, x: Tensor, rows: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """``(samples of the group, ..., r)``."""
        return x[last_places(x, rows, indices)].to(dtype)

    def add(self, y: Tensor, selected: Tensor, group: RowColumns) -> None:
        part = y.index_select(0, group.rows).contiguous()
        flat = part.view(-1, part.shape[-1])
        flat.addmm_(selected.reshape(-1, selected.shape[-1]), group.delta.to(y.dtype).t(), alpha=group.scale)
        y.index_copy_(0, group.rows, part)

    def delta_gradient(
        self, selected: Tensor, grad_rows: Tensor, indices: Tensor, scale: float, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        return column_gradient(selected, grad_rows.reshape(-1, grad_rows.shape[-1]), scale, dtype)

    def add_input_gradient(self, grad_x: Tensor, grad_rows: Tensor, group: RowColumns) -> None:
        flat = grad_rows.reshape(-1, grad_rows.shape[-1])
        part = torch.mm(flat, group.delta.to(flat.dtype)) * group.scale
        places = last_places(grad_x, group.rows, group.indices)
        grad_x[places] = part.view(*grad_rows.shape[:-1], -1).to(grad_x.dtype)


def last_places(x: Tensor, rows: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Index tensors, broadcast against each other, of ``x[rows][..., indices]``: the chosen values and no others."""
    ranges = [rows, *(torch.arange(size, device=x.device) for size in x.shape[1:-1]), indices]
    return tuple(r.view(-1, *[1] * (len(ranges) - 1 - n)) for n, r in enumerate(ranges))


class _AddColumnsByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        product: RowProduct,
        scales: tuple[float, ...],
        after_backward: Callable[[], None] | None,
        tag: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        tensors_of = zip(tensors[::3], tensors[1::3], tensors[2::3], scales, strict=True)
        groups = [RowColumns(*parts) for parts in tensors_of]
        result = y.clone()  # hooks and autograd may hold y itself
        saved: list[Tensor | None] = []
        ctx.needed = [ctx.needs_input_grad[6 + 3 * n + 1] for n in range(len(groups))]
        with torch.autocast(y.device.type, enabled=False):
            for group, need in zip(groups, ctx.needed, strict=True):
                selected = product.select(x, group.rows, group.indices, y.dtype)
                product.add(result, selected, group)
                saved += [group.rows, group.indices]
                saved.append(group.delta if ctx.needs_input_grad[1] else None)
                saved.append(selected if need else None)
        ctx.save_for_backward(tag, *saved)
        ctx.product, ctx.scales, ctx.after_backward, ctx.tag = product, scales, after_backward, int(tag)
        ctx.deltas = [(group.delta.shape, group.delta.dtype) for group in groups]
        ctx.x_shape, ctx.x_dtype, ctx.compute_dtype = x.shape, x.dtype, y.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, *saved = ctx.saved_tensors
        if int(tag) != ctx.tag:
            raise RuntimeError(
                "Activation checkpointing repeated a forward pass of a mixed batch (adapter_names) with other adapters "
                "than it first ran with. Switch checkpointing off for mixed batches."
            )
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_x, grads = _gradients(ctx, grad_output, saved)
        if ctx.after_backward is not None:
            ctx.after_backward()
        return grad_output, grad_x, None, None, None, None, *(g for grad in grads for g in (None, grad, None))


def _gradients(ctx: Any, grad_output: Tensor, saved: list[Any]) -> tuple[Tensor | None, list[Tensor | None]]:
    product: RowProduct = ctx.product
    grad_x = grad_output.new_zeros(ctx.x_shape, dtype=ctx.x_dtype) if ctx.needs_input_grad[1] else None
    grads: list[Tensor | None] = []
    for n, (scale, (size, dtype)) in enumerate(zip(ctx.scales, ctx.deltas, strict=True)):
        rows, indices, delta, selected = saved[4 * n : 4 * n + 4]
        grad_rows = grad_output.index_select(0, rows).to(ctx.compute_dtype)
        needed = ctx.needed[n]
        grads.append(product.delta_gradient(selected, grad_rows, indices, scale, size, dtype) if needed else None)
        if grad_x is not None:
            product.add_input_gradient(grad_x, grad_rows, RowColumns(rows, delta, indices, scale))
    return grad_x, grads

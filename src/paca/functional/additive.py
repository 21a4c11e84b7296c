"""The additive map: trained columns on top of a layer whose weight is never written. Plain tensors in and out.

For weights that can be neither written nor read: quantizations that only multiply, weights that are elsewhere until
their layer runs. ``y + sum_a scale_a * x[..., indices_a] @ delta_a.T``, and ``x[..., indices]`` is all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.columns.recomputation import check_same_state
from paca.columns.state import State
from paca.functional.column_blocks import take_columns
from paca.functional.linear import column_gradient, not_a_view


def add_columns(y: Tensor, x: Tensor, state: State) -> Tensor:
    """Add the columns of ``state`` to what the base layer made of ``x``.

    Args:
        y: ``(..., out_features)``; the matmuls are in its dtype.
        x: ``(..., in_features)``, the base layer's input: any dimensions and strides, may be empty.
        state: the adapters' deltas ``(out_features, r_a)``, indices ``(r_a,)`` and scales.

    Returns:
        ``(..., out_features)``, a new tensor.
    """
    columns = state.columns
    return _AddColumns.apply(y, x, state, *(c.indices for c in columns), *(c.delta for c in columns))


class _AddColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, state: State, *indices_then_deltas: Tensor) -> Tensor:
        count = len(state.columns)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        ctx.state, ctx.input_shape, ctx.input_dtype = state, x.shape, x.dtype
        # Gather before the cast: that reads r columns of x instead of casting all of it.
        kept = [take_columns(x, i, run).to(y.dtype) for i, run in zip(indices, state.runs, strict=True)]
        with torch.autocast(y.device.type, enabled=False):
            total = y.reshape(-1, y.shape[-1])
            for selected, delta, c in zip(kept, deltas, state.columns, strict=True):
                rows = selected.reshape(-1, selected.shape[-1])
                total = torch.addmm(total, rows, delta.to(y.dtype).t(), alpha=c.scale)
        ctx.save_for_backward(state.tag_tensor, *indices, *kept, *deltas)
        return not_a_view(total.reshape(y.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, *saved = ctx.saved_tensors
        check_same_state(tag, ctx.state)
        columns = ctx.state.columns
        count = len(columns)
        indices, kept, deltas = saved[:count], saved[count : 2 * count], saved[2 * count :]
        needs = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out_features)
        grad_x: Tensor | None = None
        grad_deltas: list[Tensor | None] = []
        with torch.autocast(grad_output.device.type, enabled=False):
            if needs[1]:
                grad_x = rows.new_zeros(ctx.input_shape)
                for i, delta, c in zip(indices, deltas, columns, strict=True):
                    part = torch.mm(rows, delta.to(rows.dtype)).mul_(c.scale)
                    grad_x.index_add_(-1, i, part.view(*ctx.input_shape[:-1], i.numel()))
                grad_x = grad_x.to(ctx.input_dtype)
            for need, selected, delta, c in zip(needs[3 + count :], kept, deltas, columns, strict=True):
                grad_deltas.append(column_gradient(selected, rows, c.scale, delta.dtype) if need else None)
        return grad_output if needs[0] else None, grad_x, None, *([None] * count), *grad_deltas

"""The patched linear map: a quantized weight, its trained columns written into what each matmul dequantizes.

Forward and backward dequantize anyway. Into that temporary go the columns ``W0[:, idx] + s * delta``, rounded once; it
is gone after the matmul. Kept are ``x[..., idx]`` and references to the deltas; no dequantized weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.columns.recomputation import check_same_state
from paca.columns.state import Columns, State
from paca.functional.column_blocks import put_columns, take_columns
from paca.functional.linear import column_gradient, input_gradient, not_a_view
from paca.functional.rounding import add_once, round_once

Dequantize = Callable[[torch.dtype, Tensor | None], tuple[Tensor, Tensor]]
"""``(dtype, positions (k,))`` -> a new weight ``(out_features, in_features)`` in ``dtype``, and its columns
``(out_features, k)`` before they were rounded to it; no positions stand for none."""


def patched_linear(x: Tensor, bias: Tensor | None, dequantize: Dequantize, dtype: torch.dtype, state: State) -> Tensor:
    """Apply the dequantized and patched weight to ``x``; send gradients to ``x``, ``bias`` and the deltas.

    Args:
        x: ``(..., in_features)``, one dimension or more, any strides, may be empty.
        bias: ``(out_features,)`` or None.
        dequantize: called in the forward and again in the backward pass, where it has to raise if the weight is not
            the same any more.
        dtype: of the matmuls.
        state: the adapters' deltas ``(out_features, r_a)``, indices ``(r_a,)`` and scales; may hold none.

    Returns:
        ``(..., out_features)`` in ``dtype``.
    """
    columns = state.columns
    return _PatchedLinear.apply(
        x, bias, dequantize, dtype, state, *(c.indices for c in columns), *(c.delta for c in columns)
    )


@torch.no_grad()
def patched_weight(dequantize: Dequantize, dtype: torch.dtype, columns: tuple[Columns, ...]) -> Tensor:
    """``round(W0 + sum_a scale_a * scatter(delta_a, indices_a))`` as a new ``(out_features, in_features)``.

    ``W0`` is the dequantized weight. The trained columns are summed in float64 (float32 on devices without it) and
    rounded once to ``dtype``; columns that several adapters share add up.
    """
    if not columns:
        return dequantize(dtype, None)[0]
    positions = columns[0].indices if len(columns) == 1 else torch.cat([c.indices for c in columns]).unique(sorted=True)
    weight, originals = dequantize(dtype, positions)
    put_columns(weight, 1, positions, _values(originals, positions, columns, dtype))
    return weight


def _values(originals: Tensor, positions: Tensor, columns: tuple[Columns, ...], dtype: torch.dtype) -> Tensor:
    if len(columns) == 1 and originals.dtype == dtype:
        return add_once(originals, columns[0].delta.detach(), columns[0].scale)
    wide = torch.float32 if originals.device.type == "mps" else torch.float64
    total = originals.to(wide)
    for c in columns:
        part = c.delta.detach().to(wide)
        if len(columns) == 1:
            total = torch.add(total, part, alpha=c.scale)
        else:
            total = total.index_add(1, torch.searchsorted(positions, c.indices), part, alpha=c.scale)
    return round_once(total, dtype)


class _PatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        dequantize: Dequantize,
        dtype: torch.dtype,
        state: State,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        count = len(state.columns)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        with torch.autocast(x.device.type, enabled=False):
            weight = patched_weight(dequantize, dtype, state.columns)
            y = not_a_view(F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)))
        needed = ctx.needs_input_grad[5 + count :]
        # Gather before the cast: that reads r columns of x instead of casting all of it.
        kept = [
            take_columns(x, i, run).to(dtype) for i, run, need in zip(indices, state.runs, needed, strict=True) if need
        ]
        ctx.dequantize, ctx.dtype, ctx.state, ctx.input_dtype = dequantize, dtype, state, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The deltas: so that autograd raises if one is changed in place before the backward pass reads it again.
        ctx.save_for_backward(state.tag_tensor, *kept, *deltas)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, *saved = ctx.saved_tensors
        check_same_state(tag, ctx.state)
        columns = ctx.state.columns
        count = len(columns)
        needs = ctx.needs_input_grad
        grad_output = grad_output.to(ctx.dtype)
        rows = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out_features)
        grad_x = grad_bias = None
        grad_deltas: list[Tensor | None] = []
        with torch.autocast(grad_output.device.type, enabled=False):
            if needs[0]:
                weight = patched_weight(ctx.dequantize, ctx.dtype, columns)
                grad_x = input_gradient(grad_output, weight, 1).to(ctx.input_dtype)
                del weight
            if needs[1]:
                grad_bias = rows.sum(0).to(ctx.bias_dtype)
            kept = iter(saved)
            for need, c in zip(needs[5 + count :], columns, strict=True):
                grad_deltas.append(column_gradient(next(kept), rows, c.scale, c.delta.dtype) if need else None)
        return grad_x, grad_bias, None, None, None, *([None] * count), *grad_deltas

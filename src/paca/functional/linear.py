"""The partially trained linear map: plain tensors in, plain tensors out.

One GEMM forward, one GEMM and one skinny GEMM backward, and ``x[..., indices]`` as the only activation kept
(PaCA, arXiv 2503.01905, section 3.2). The trained columns already sit inside ``weight``; this file never writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional.column_blocks import Runs, take_columns

HALF_DTYPES = (torch.float16, torch.bfloat16)


def partial_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    scales: Sequence[float],
    *,
    input_dim: int = 1,
    runs: Sequence[Runs | None] | None = None,
    before_backward: Callable[[int], None] | None = None,
    state_tag: Tensor | None = None,
    weight_again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Apply ``weight`` to ``x``; send gradients to ``x``, ``bias`` and the columns' ``deltas``.

    The forward pass reads ``weight`` alone: it must already hold ``W0 + sum_a scales[a] * scatter(deltas[a])``.
    The backward pass gives ``scales[a] * gy.T @ x[..., indices[a]]`` for each delta.

    Args:
        x: ``(..., in_features)``, one to four dimensions or more, any strides, may be empty.
        weight: ``(out_features, in_features)`` for ``input_dim=1`` (``nn.Linear``), ``(in_features, out_features)``
            for ``input_dim=0`` (transformers' ``Conv1D``). Must not require grad: only its columns are trained.
        bias: ``(out_features,)`` or None. Gets a gradient if it requires one.
        deltas: one ``(out_features, r_a)`` per adapter.
        indices: one ``(r_a,)`` int64 per adapter: the columns that the delta belongs to.
        scales: one factor per adapter, ``paca_alpha / r``.
        input_dim: the dimension of ``weight`` that runs over the input features.
        runs: ``runs_of`` each of ``indices``, if known.
        before_backward: called with the saved tag before ``weight`` is read in the backward pass; it has to put the
            columns of the forward pass back. With it, ``weight`` is exempt from autograd's version check; without
            it, a weight that was written in between raises as usual.
        state_tag: a scalar tensor that names the columns ``weight`` holds now. It is saved with the activations, so
            that a recomputation by activation checkpointing replaces it together with them.
        weight_again: gives ``weight`` in the backward pass, after ``before_backward``. For a weight that is a view: its
            tensor may have moved to other memory since (``ResidentColumns.lend``), and the view would stay behind.

    Returns:
        ``(..., out_features)`` in the dtype of the matmul (under autocast, autocast's).

    Raises:
        ValueError: if ``weight`` requires grad.
    """
    if weight.requires_grad:
        raise ValueError(
            "The weight of an adapted layer requires grad, but PaCA trains its columns only: the rest of the weight "
            "would get no gradient. Call weight.requires_grad_(False), or train the layer whole through "
            "modules_to_save instead of target_modules. (FSDP1 makes every weight it flattens require grad; PaCA can't "
            "train under it.)"
        )
    runs = (None,) * len(indices) if runs is None else tuple(runs)
    return _PartialLinear.apply(
        x, weight, bias, input_dim, tuple(scales), runs, before_backward, state_tag, weight_again, *indices, *deltas
    )


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, input_dim: int) -> Tensor:
    """What the stock module computes, with the stock module's own operators, so that results agree bitwise."""
    if input_dim == 1:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.matmul(x, weight)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])


def not_a_view(y: Tensor) -> Tensor:
    """``y`` for the output of a custom function: autograd forbids to write into one that is a view (an activation that
    works in place would), and with a bias a stock operator gives a view of something that nobody else holds."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _PartialLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_dim: int,
        scales: tuple[float, ...],
        runs: tuple[Runs | None, ...],
        before_backward: Callable[[int], None] | None,
        state_tag: Tensor | None,
        weight_again: Callable[[], Tensor] | None,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        count = len(scales)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        # Gather first: x was just written, and the matmul would drive it out of cache.
        # Gather before the cast: under autocast that reads r columns of x instead of casting all of it.
        needed = ctx.needs_input_grad[9 + count :]
        selected = [take_columns(x, i, run) for i, run, need in zip(indices, runs, needed, strict=True) if need]
        y = not_a_view(plain_linear(x, weight, bias, input_dim))
        kept = [_as(s, y.dtype) for s in selected]
        ctx.scales, ctx.input_dim, ctx.before_backward = scales, input_dim, before_backward
        ctx.input_dtype, ctx.compute_dtype = x.dtype, y.dtype
        ctx.delta_dtypes = tuple(d.dtype for d in deltas)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if before_backward is None:
            ctx.save_for_backward(weight, *kept)
        else:
            assert state_tag is not None
            # No version check: before_backward puts the right columns back.
            ctx.weight, ctx.weight_again = (weight if weight_again is None else None), weight_again
            ctx.save_for_backward(state_tag, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        first, *kept = ctx.saved_tensors
        if ctx.before_backward is None:
            weight = first
        else:
            ctx.before_backward(int(first))
            weight = ctx.weight if ctx.weight_again is None else ctx.weight_again()
        device_type = grad_output.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _gradients(ctx, grad_output, weight, kept)
        return _gradients(ctx, grad_output, weight, kept)


def _gradients(ctx: Any, grad_output: Tensor, weight: Tensor, kept: list[Tensor]) -> tuple[Any, ...]:
    count = len(ctx.scales)
    grad_x = grad_bias = None
    needed = ctx.needs_input_grad
    grad_output = _as(grad_output, ctx.compute_dtype)
    rows = grad_output.reshape(-1, grad_output.shape[-1])  # (tokens, out_features)
    # Columns first: grad_output was just written, and the large matmul would drive it out of cache.
    grad_deltas: list[Tensor | None] = []
    remaining = iter(kept)
    for need, scale, dtype in zip(needed[9 + count :], ctx.scales, ctx.delta_dtypes, strict=True):
        grad_deltas.append(column_gradient(next(remaining), rows, scale, dtype) if need else None)
    if needed[2]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    if needed[0]:
        grad_x = _as(input_gradient(grad_output, weight, ctx.input_dim), ctx.input_dtype)
    return grad_x, None, grad_bias, *([None] * (6 + count)), *grad_deltas


def input_gradient(grad_output: Tensor, weight: Tensor, input_dim: int) -> Tensor:
    """``grad_output (..., out_features)`` times the weight: ``(..., in_features)``, in ``grad_output``'s dtype."""
    matrix = weight if input_dim == 1 else weight.t()  # (out_features, in_features)
    # Under autocast the cast of the weight is made anew here: keeping it would hold a copy of W in the graph.
    return torch.matmul(grad_output, _as(matrix, grad_output.dtype))


def column_gradient(selected: Tensor, grad_rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * grad_rows.T @ selected``, accumulated in float32 where the backend can, as ``(out_features, r)``.

    Args:
        selected: ``(..., r)`` input columns.
        grad_rows: ``(tokens, out_features)``.
        scale: ``paca_alpha / r``.
        dtype: of the delta.
    """
    # (r, tokens) @ (tokens, out): 1.4x the rate of (out, tokens) @ (tokens, r) on CPU (bf16, out 1024-3584, r 16).
    columns = selected.reshape(-1, selected.shape[-1]).t()
    if columns.dtype in HALF_DTYPES and dtype == torch.float32 and columns.device.type == "cuda":
        product = torch.mm(columns, grad_rows, out_dtype=torch.float32)  # CPU has no such kernel in torch 2.13
    else:
        product = torch.mm(columns, grad_rows)
    # Autograd wants the delta's own layout: converting and transposing in one pass saves it another.
    gradient = product.t().to(dtype, memory_format=torch.contiguous_format, copy=True)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without its microsecond where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

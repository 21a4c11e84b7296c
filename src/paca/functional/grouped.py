"""The partially trained linear map of a stack of experts: plain tensors in, plain tensors out.

Rows sorted by expert meet each expert's own weight in one grouped matmul; ``x[:, indices]`` of the routed rows is the
only activation kept. As in ``linear``, the trained columns already sit inside ``weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional.linear import column_gradient

GroupedMatmul = Callable[..., Tensor]
"""``(rows (tokens, k), matrices (experts, k, n), offs=(experts,)) -> (tokens, n)``, such as ``torch._grouped_mm``."""


def grouped_partial_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    scales: Sequence[float],
    *,
    input_dim: int,
    matmul: GroupedMatmul,
    before_backward: Callable[[int], None],
    state_tag: Tensor,
) -> Tensor:
    """Apply each expert's weight to its rows of ``x``; send gradients to ``x`` and the columns' ``deltas``.

    The backward pass gives ``scales[a] * gy_e.T @ x_e[:, indices[a]]`` for each delta and expert ``e``, from the rows
    routed to it; an expert that got no rows gets zeros.

    Args:
        x: ``(tokens, in_features)``, rows sorted by expert, in the weight's dtype.
        weight: ``(experts, out_features, in_features)`` for ``input_dim=-1``, ``(experts, in_features, out_features)``
            for ``input_dim=-2``; holds the columns, and does not require grad.
        offsets: ``(experts,)`` int: where each expert's rows end. Rows past the last are nobody's.
        deltas: one ``(experts, out_features, r_a)`` per adapter.
        indices: one ``(r_a,)`` int64 per adapter, the same columns in every expert.
        scales: one factor per adapter, ``paca_alpha / r``.
        input_dim: the dimension of ``weight`` that runs over the input features.
        matmul: multiplies the groups; its results are the stock model's bit for bit.
        before_backward: as for ``partial_linear``.
        state_tag: as for ``partial_linear``.

    Returns:
        ``(tokens, out_features)``.

    Raises:
        ValueError: if ``weight`` requires grad.
    """
    if weight.requires_grad:
        raise ValueError(
            "A stack of experts requires grad, but PaCA trains its columns only: the rest of the stack would get no "
            "gradient. Call requires_grad_(False) on it."
        )
    return _GroupedPartialLinear.apply(
        x, weight, offsets, input_dim, matmul, tuple(scales), before_backward, state_tag, *indices, *deltas
    )


class _GroupedPartialLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        input_dim: int,
        matmul: GroupedMatmul,
        scales: tuple[float, ...],
        before_backward: Callable[[int], None],
        state_tag: Tensor,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        count = len(scales)
        matrices = weight.mT if input_dim == -1 else weight  # (experts, in_features, out_features)
        y = matmul(x, matrices, offs=offsets)
        needed = ctx.needs_input_grad[8 + count :]
        kept = [x.index_select(-1, i) for i, need in zip(indices_then_deltas[:count], needed, strict=True) if need]
        # No version check: before_backward puts the right columns back. The tensor itself and no view of it, which
        # would stay behind if it moves to other memory.
        ctx.weight, ctx.input_dim = weight, input_dim
        ctx.matmul, ctx.scales, ctx.before_backward = matmul, scales, before_backward
        ctx.delta_dtypes = tuple(d.dtype for d in indices_then_deltas[count:])
        ctx.save_for_backward(state_tag, offsets, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, offsets, *kept = ctx.saved_tensors
        ctx.before_backward(int(tag))
        count = len(ctx.scales)
        grad_output = grad_output.contiguous()  # the kernels refuse expanded rows
        transposed = ctx.weight if ctx.input_dim == -1 else ctx.weight.mT  # (experts, out_features, in_features)
        grad_x = ctx.matmul(grad_output, transposed, offs=offsets) if ctx.needs_input_grad[0] else None
        grad_deltas: list[Tensor | None] = []
        remaining = iter(kept)
        for need, scale, dtype in zip(ctx.needs_input_grad[8 + count :], ctx.scales, ctx.delta_dtypes, strict=True):
            if not need:
                grad_deltas.append(None)
            elif ctx.matmul is torch._grouped_mm:
                grad_deltas.append(_gradient_by_kernel(next(remaining), grad_output, offsets, scale, dtype))
            else:
                grad_deltas.append(_gradient_by_expert(next(remaining), grad_output, offsets, scale, dtype))
        return grad_x, *([None] * (7 + count)), *grad_deltas


def _gradient_by_kernel(
    selected: Tensor, grad_rows: Tensor, offsets: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """``scale * grad_rows_e.T @ selected_e`` of all experts in one kernel; the host need not know the offsets.

    It rounds to the matmul's dtype once: torch 2.13 has no grouped kernel with a wider result.
    """
    r = selected.shape[1]
    missing = -r % (16 // selected.element_size())  # the kernel wants rows of whole 16 bytes
    columns = F.pad(selected, (0, missing)) if missing else selected
    product = torch._grouped_mm(columns.t(), grad_rows, offs=offsets)[:, :r]  # (experts, r, out_features)
    gradient = torch.empty(product.mT.shape, dtype=dtype, device=product.device).copy_(product.mT)
    return gradient if scale == 1.0 else gradient.mul_(scale)


def _gradient_by_expert(
    selected: Tensor, grad_rows: Tensor, offsets: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The same, expert by expert, where there is no such kernel."""
    gradient = grad_rows.new_zeros((offsets.numel(), grad_rows.shape[1], selected.shape[1]), dtype=dtype)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            gradient[expert] = column_gradient(selected[start:end], grad_rows[start:end], scale, dtype)
        start = end
    return gradient

"""The partially trained embedding: plain tensors in, plain tensors out.

A column is an embedding dimension: of ``weight (num_embeddings, embedding_dim)`` the columns ``weight[:, indices]``
are trained. They already sit inside the weight; the tokens are the only thing kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def partial_embedding(
    tokens: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    scales: Sequence[float],
    *,
    gradient_settings: tuple[int, bool],
    before_backward: Callable[[int], None],
    state_tag: Tensor,
) -> Tensor:
    """Look ``tokens`` up in ``weight``; send gradients to the columns' ``deltas``.

    Args:
        tokens: any shape, int32 or int64.
        weight: ``(num_embeddings, embedding_dim)``, already holding the columns. Must not require grad.
        deltas: one ``(num_embeddings, r_a)`` per adapter.
        indices: one ``(r_a,)`` int64 per adapter: embedding dimensions.
        scales: one factor per adapter, ``paca_alpha / r``.
        gradient_settings: ``padding_idx``, the token whose row gets no gradient (-1 for none), and
            ``scale_grad_by_freq``: whether each token's gradient is divided by how often it occurs in ``tokens``.
        before_backward: called with the saved tag in the backward pass. The weight is not read there, but a
            recomputation with other adapters has to be refused here as in every layer.
        state_tag: a scalar tensor that names the columns ``weight`` holds now; saved with the tokens.

    Returns:
        ``(*tokens.shape, embedding_dim)`` in the weight's dtype.

    Raises:
        ValueError: if ``weight`` requires grad.
    """
    if weight.requires_grad:
        raise ValueError(
            "The weight of an adapted embedding requires grad, but PaCA trains its columns only. Call "
            "weight.requires_grad_(False), or train the layer whole through modules_to_save."
        )
    return _PartialEmbedding.apply(
        tokens, weight, gradient_settings, tuple(scales), before_backward, state_tag, *indices, *deltas
    )


class _PartialEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        settings: tuple[int, bool],
        scales: tuple[float, ...],
        before_backward: Callable[[int], None],
        state_tag: Tensor,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        count = len(scales)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        ctx.needed = ctx.needs_input_grad[6 + count :]
        ctx.settings, ctx.scales, ctx.before_backward = settings, scales, before_backward
        ctx.rows, ctx.delta_dtypes = weight.shape[0], tuple(d.dtype for d in deltas)
        ctx.save_for_backward(state_tag, tokens, *indices)
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, tokens, *indices = ctx.saved_tensors
        ctx.before_backward(int(tag))
        grad_deltas = [
            column_gradient(grad_output, tokens, i, ctx.rows, ctx.settings, scale, dtype) if need else None
            for need, i, scale, dtype in zip(ctx.needed, indices, ctx.scales, ctx.delta_dtypes, strict=True)
        ]
        return None, None, None, None, None, None, *([None] * len(indices)), *grad_deltas


def column_gradient(
    grad_output: Tensor,
    tokens: Tensor,
    indices: Tensor,
    rows: int,
    settings: tuple[int, bool],
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a delta, ``(num_embeddings, r)``, accumulated in float32 or wider.

    Args:
        grad_output: ``(*tokens.shape, embedding_dim)``.
        tokens: any shape.
        indices: ``(r,)``, the embedding dimensions of the delta.
        rows: ``num_embeddings``.
        settings: ``padding_idx`` (-1 for none) and ``scale_grad_by_freq``.
        scale: ``paca_alpha / r``.
        dtype: of the delta.
    """
    selected = grad_output.index_select(-1, indices).to(torch.promote_types(dtype, torch.float32))
    if scale != 1.0:
        selected = selected * scale
    padding_idx, scale_grad_by_freq = settings
    gradient = torch.ops.aten.embedding_dense_backward(selected, tokens, rows, padding_idx, scale_grad_by_freq)
    return gradient.to(dtype)

"""The norms of a weight gradient's columns, from what a layer's backward pass has at hand; torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paca.columns.selection import weight_norms
from paca.functional.convolution import ConvolutionProduct, Geometry

_AT_ONCE = 2**20  # values of the gradient that are there at a time: 4 MiB


def linear_squares(x: Tensor, grad_output: Tensor) -> Tensor:
    """``(in_features,)``: the squared norms of the columns of ``grad_output.T @ x``, made a few columns at a time.

    Args:
        x: ``(n, in_features)``.
        grad_output: ``(n, out_features)``.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad_output.dtype), torch.float32)
    rows = grad_output.to(dtype).t()  # (out_features, n)
    parts = x.split(max(1, _AT_ONCE // max(1, rows.shape[0])), dim=1)
    return torch.cat([weight_norms(rows @ part.to(dtype), 1).square() for part in parts])


def embedding_squares(tokens: Tensor, grad_output: Tensor) -> Tensor:
    """``(embedding_dim,)``: the same for an embedding, whose gradient has rows for the tokens that occur only.

    Args:
        tokens: ``(n,)``.
        grad_output: ``(n, embedding_dim)``.
    """
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    occurring, places = tokens.unique(return_inverse=True)
    gradient = torch.zeros(occurring.numel(), grad_output.shape[1], dtype=dtype, device=grad_output.device)
    gradient.index_add_(0, places, grad_output.to(dtype))
    return weight_norms(gradient, 1).square()


def convolution_squares(x: Tensor, grad_output: Tensor, module: Any) -> Tensor:
    """``(in_channels / groups,)``: the same for a convolution, over its outputs and its kernel.

    Args:
        x: ``(batch, in_channels, *space)`` or without the batch.
        grad_output: of its output.
        module: the ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``.
    """
    product = ConvolutionProduct(Geometry.of(module))
    dtype = torch.promote_types(torch.promote_types(x.dtype, grad_output.dtype), torch.float32)
    columns = torch.arange(module.in_channels // module.groups, device=x.device)
    kernel = tuple(module.kernel_size)
    per_column = module.out_channels * int(torch.tensor(kernel).prod())
    squares = []
    for part in columns.split(max(1, _AT_ONCE // per_column)):
        size = torch.Size((module.out_channels, part.numel(), *kernel))
        selected = product.select(x, part, None).to(dtype)
        gradient = product.delta_gradient(selected, grad_output.to(dtype), part, 1.0, size, dtype)
        squares.append(weight_norms(gradient, 1).square())
    return torch.cat(squares)

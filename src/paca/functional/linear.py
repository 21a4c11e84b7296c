"""The linear product. A column is an input feature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paca.functional.added import AddedToLinear
from paca.functional.column_blocks import take_columns
from paca.functional.product import Product
from paca.functional.train_columns import in_dtype, scaled


class LinearProduct(AddedToLinear, Product):
    """`x (..., in_features)` times a weight: `(out_features, in_features)`, or, if `input_dim` is 0 instead of 1,
    `(in_features, out_features)` (transformers' `Conv1D`)."""

    def __init__(self, input_dim: int) -> None:
        self.input_dim = input_dim

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.input_dim == 1:
            return F.linear(x, weight, bias)
        if bias is None:
            return torch.matmul(x, weight)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    select = staticmethod(take_columns)

    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        matrix = weight if self.input_dim == 1 else weight.t()  # (out_features, in_features)
        # Under autocast the cast of the weight is made anew here: keeping it would hold a copy of W in the graph.
        return torch.matmul(grad_output, in_dtype(matrix, grad_output.dtype))

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        return column_gradient(selected, grad_output.reshape(-1, grad_output.shape[-1]), scale, dtype)


def column_gradient(selected: Tensor, grad_rows: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
    """`scale * grad_rows.T @ selected` in `dtype`, accumulated in float32 where the backend can: `(out_features, r)`,
    of `selected (..., r)` and `grad_rows (tokens, out_features)`."""
    # (r, tokens) @ (tokens, out): 1.4x the rate of (out, tokens) @ (tokens, r) on CPU (bf16, out 1024-3584, r 16).
    columns = selected.reshape(-1, selected.shape[-1]).t()
    if columns.element_size() == 2 and dtype == torch.float32 and columns.device.type == "cuda":
        product = torch.mm(columns, grad_rows, out_dtype=torch.float32)  # CPU has no such kernel in torch 2.13
    else:
        product = torch.mm(columns, grad_rows)
    # Autograd wants the delta's own layout: converting and transposing in one pass saves it another.
    gradient = torch.empty((product.shape[1], product.shape[0]), dtype=dtype, device=product.device)
    gradient.t().copy_(product)  # in the order that the product lies in: faster than .t().to(dtype)
    return scaled(gradient, scale)

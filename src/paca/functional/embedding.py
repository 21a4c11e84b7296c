"""The embedding product. A column is an embedding dimension; the tokens are all that is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paca.functional.column_blocks import Runs
from paca.functional.product import Product
from paca.functional.train_columns import scaled


class EmbeddingProduct(Product):
    """Looks tokens, of any shape, up in `weight (num_embeddings, embedding_dim)`; deltas are `(num_embeddings, r)`. The
    row of `padding_idx` gets no gradient (-1 for none); `scale_grad_by_freq` divides a token's by how often it occurs.
    """

    reads_indices = True

    def __init__(self, padding_idx: int, scale_grad_by_freq: bool) -> None:
        self.padding_idx, self.scale_grad_by_freq = padding_idx, scale_grad_by_freq

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, weight)

    def select(self, x: Tensor, indices: Tensor, runs: Runs | None) -> Tensor:
        return x

    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        raise AssertionError("tokens have no gradient")

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        columns = grad_output.index_select(-1, indices).to(torch.promote_types(dtype, torch.float32))
        gradient = torch.ops.aten.embedding_dense_backward(
            scaled(columns, scale), selected, size[0], self.padding_idx, self.scale_grad_by_freq
        )
        return gradient.to(dtype)

    def add_contribution(self, y: Tensor, selected: Tensor, indices: Tensor, delta: Tensor, scale: float) -> Tensor:
        change = F.embedding(selected, delta)
        wide = torch.promote_types(y.dtype, torch.float32)
        sums = torch.add(y.index_select(-1, indices).to(wide), change.to(wide), alpha=scale)
        return y.index_copy(-1, indices, sums.to(y.dtype))

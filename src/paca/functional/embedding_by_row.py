"""What the columns of some samples' adapter contribute to an embedding: the delta's rows of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.functional.columns_by_row import RowColumns, RowProduct, last_places
from paca.functional.embedding import column_gradient
from paca.functional.rounding import add_once


class EmbeddingProduct(RowProduct):
    """``scale * delta[tokens]`` in the dimensions ``indices``, delta ``(num_embeddings, r)``; rounded once.

    Args:
        gradient_settings: ``padding_idx`` (-1 for none) and ``scale_grad_by_freq``, which counts an adapter's samples.
    """

    def __init__(self, gradient_settings: tuple[int, bool]) -> None:
        self.gradient_settings = gradient_settings

    def select(self, x: Tensor, rows: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The samples' tokens, ``(samples of the group, ...)``."""
        return x.index_select(0, rows)

    def add(self, y: Tensor, selected: Tensor, group: RowColumns) -> None:
        places = last_places(y, group.rows, group.indices)
        change = group.delta.index_select(0, selected.reshape(-1)).view(*selected.shape, -1)
        y[places] = add_once(y[places], change, group.scale)

    def delta_gradient(
        self, selected: Tensor, grad_rows: Tensor, indices: Tensor, scale: float, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        return column_gradient(grad_rows, selected, indices, size[0], self.gradient_settings, scale, dtype)

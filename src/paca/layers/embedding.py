"""PaCA for embeddings: ``nn.Embedding``. A column is an embedding dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paca.columns.state import Columns, State
from paca.functional.embedding import column_gradient, partial_embedding
from paca.functional.embedding_by_row import EmbeddingProduct
from paca.layers.base import PacaLayer
from paca.layers.compiled_weight import OpaqueWeight
from paca.layers.resident_weight import ResidentWeight


class ResidentEmbedding(OpaqueWeight, nn.Embedding):
    """An ``nn.Embedding`` with resident columns ``weight[:, indices]``, weight ``(num_embeddings, embedding_dim)``."""

    stock_class = nn.Embedding
    input_dim = 1
    bias = None
    channel_dim = -1

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        embedding: Any = module
        if embedding.max_norm is not None:
            return (
                f"is an embedding with max_norm={embedding.max_norm}, which rewrites its weight in every forward pass; "
                "PaCA keeps the pretrained weight as it is. Leave it out of target_modules, or set max_norm to None."
            )
        if embedding.sparse:
            return (
                "is an embedding with sparse=True, but the gradient that PaCA computes is dense (num_embeddings, r). "
                "Set its attribute sparse to False, or leave it out of target_modules."
            )
        return None

    @property
    def gradient_settings(self) -> tuple[int, bool]:
        """``padding_idx`` (-1 for none) and ``scale_grad_by_freq``."""
        return -1 if self.padding_idx is None else self.padding_idx, self.scale_grad_by_freq

    def _run_partial(self, x: Tensor, state: State) -> Tensor:
        return partial_embedding(
            x,
            self.weight,
            self._deltas_of(state),
            state.indices,
            state.scales,
            gradient_settings=self.gradient_settings,
            before_backward=self._before_backward(state),
            state_tag=state.tag_tensor,
        )

    # -- within a compiled graph ----------------------------------------------------------------------------------

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.weight.dtype

    def output_size(self, x: Tensor) -> list[int]:
        return [*x.shape, self.weight.shape[1]]

    def keep(self, x: Tensor, indices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [x] if indices else []

    def run_plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(x, self.weight)

    def column_gradients(
        self, grad_output: Tensor, kept: Sequence[Tensor], columns: Sequence[Columns], dtype: torch.dtype
    ) -> list[Tensor]:
        rows = self.weight.shape[0]
        return [
            column_gradient(grad_output, kept[0], c.indices, rows, self.gradient_settings, c.scale, dtype)
            for c in columns
        ]


RESIDENT_CLASSES: dict[type[nn.Module], type[ResidentWeight]] = {nn.Embedding: ResidentEmbedding}


class PacaEmbedding(PacaLayer):
    """The adapted embedding: keeps each adapter's deltas ``(num_embeddings, r)`` and indices."""

    input_axes = "(samples, ...)"

    @property
    def input_dims(self) -> int:
        return 1

    def row_product(self) -> EmbeddingProduct:
        return EmbeddingProduct(self.base_layer.gradient_settings)

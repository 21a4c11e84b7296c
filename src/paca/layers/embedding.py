"""PaCA for embeddings: `nn.Embedding`. A column is an embedding dimension."""

from __future__ import annotations

from typing import Any

from torch import nn

from paca.functional.embedding import EmbeddingProduct
from paca.layers.base import PacaLayer
from paca.layers.resident_weight import ResidentWeight


class ResidentEmbedding(ResidentWeight, nn.Embedding):
    """An `nn.Embedding` with resident columns `weight[:, indices]`, weight `(num_embeddings, embedding_dim)`."""

    stock_class = nn.Embedding
    input_dim = 1
    bias = None

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

    def product(self) -> EmbeddingProduct:
        return EmbeddingProduct(-1 if self.padding_idx is None else self.padding_idx, self.scale_grad_by_freq)


class PacaEmbedding(PacaLayer):
    """The adapted embedding: keeps each adapter's deltas `(num_embeddings, r)` and indices."""

    input_axes = "(samples, ...)"
    multiplies_a_matrix = False

    @property
    def input_dims(self) -> int:
        return 1

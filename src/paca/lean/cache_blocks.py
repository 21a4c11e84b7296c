"""Walk the rows of a tensor in blocks that stay in the cache.

A chain of elementwise operators over a whole activation writes every intermediate to memory and allocates it anew; over
blocks of some 256 KiB the intermediates live in the second-level cache. Measured on CPU (bf16, 512 x 1024, one thread):
RMSNorm forward and backward together 1.75 -> 1.1 ms with warm memory, 7 -> 1.4 ms with fresh pages. Other devices get
one block, all rows: there, launches count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """How a tensor `(..., features)` is read as a matrix `(rows, features)`, rows in the order of its memory.

    Keeping the memory order keeps the layout of a transposed input in the output, as elementwise operators do.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> RowLayout:
        """The layout of `tensor`, `(..., features)` with at least one dimension."""
        strides = tensor.stride()
        leading = sorted(range(tensor.dim() - 1), key=lambda dim: -strides[dim])
        return RowLayout(tuple(tensor.shape), (*leading, tensor.dim() - 1))

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor`, of this layout's shape, as `(rows, features)`: a view where its memory allows, else a copy."""
        return tensor.permute(self.order).reshape(-1, self.shape[-1])

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor of this layout's shape and memory order; `rows` of it is a view."""
        strides, stride = [0] * len(self.order), 1
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= max(1, self.shape[dim])
        return torch.empty_strided(self.shape, strides, dtype=dtype, device=device)


def row_blocks(rows: Tensor, elements_per_thread: int) -> Iterator[slice]:
    """Slices over the first dimension of `rows`, each of about `elements_per_thread` elements per intra-op thread."""
    count, features = rows.shape[0], rows.shape[1:].numel()
    step = max(1, elements_per_thread * torch.get_num_threads() // max(1, features))
    if rows.device.type != "cpu":
        step = max(1, count)
    for start in range(0, count, step):
        yield slice(start, start + step)

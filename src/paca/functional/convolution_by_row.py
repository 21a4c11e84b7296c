"""What the columns of some samples' adapter contribute to a convolution: a skinny convolution of their channels."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.functional.columns_by_row import RowColumns, RowProduct
from paca.functional.convolution import Geometry, channels_of, column_gradient, input_gradient, plain_convolution


class ConvolutionProduct(RowProduct):
    """The convolution of ``x[rows][:, channels]`` with ``scale * delta``, delta ``(out_channels, r, *kernel)``.

    Args:
        geometry: of the layer; its groups stay, with ``r`` channels each.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def select(self, x: Tensor, rows: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """``(samples of the group, groups * r, *space)``, before padding."""
        return x[rows[:, None], channels_of(indices, x.shape[1], self.geometry)].to(dtype)

    def add(self, y: Tensor, selected: Tensor, group: RowColumns) -> None:
        if selected.numel() == 0:
            return
        change = plain_convolution(selected, group.delta.to(y.dtype), None, self.geometry)
        y.index_add_(0, group.rows, change, alpha=group.scale)

    def delta_gradient(
        self, selected: Tensor, grad_rows: Tensor, indices: Tensor, scale: float, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        return column_gradient(grad_rows, selected, size[2:], self.geometry, scale, dtype)

    def add_input_gradient(self, grad_x: Tensor, grad_rows: Tensor, group: RowColumns) -> None:
        channels = channels_of(group.indices, grad_x.shape[1], self.geometry)
        size = [grad_rows.shape[0], channels.numel(), *grad_x.shape[2:]]
        part = input_gradient(grad_rows, group.delta, size, self.geometry) * group.scale
        grad_x[group.rows[:, None], channels] = part.to(grad_x.dtype)

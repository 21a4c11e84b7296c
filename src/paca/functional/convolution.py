"""The convolution product. A column is an input channel, with groups the same one of every group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paca.functional.column_blocks import Runs
from paca.functional.product import Product
from paca.functional.train_columns import scaled

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(eq=False)
class ConvolutionProduct(Product):
    """Convolves `x (batch, in_channels, *space)`, or one sample without `batch`, with
    `weight (out_channels, in_channels / groups, *kernel)`; deltas are `(out_channels, r, *kernel)`.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros on both sides of each spatial dimension, added by the convolution itself."""
    dilation: tuple[int, ...]
    groups: int
    edges: tuple[int, ...]
    """What is padded before, as `F.pad` takes it (last dimension first); empty for nothing."""
    mode: str
    """Of `F.pad`."""

    @classmethod
    def of(cls, module: Any) -> ConvolutionProduct:
        """What an `nn.Conv1d`, `Conv2d` or `Conv3d` computes, by the same operators."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        rank = len(module.kernel_size)
        edges = tuple(module._reversed_padding_repeated_twice)
        padding, mode = (0,) * rank, "constant"
        if module.padding_mode != "zeros":
            mode = module.padding_mode
        elif isinstance(module.padding, str):  # torch pads what "same" needs more on one side, and convolves the rest
            padding = tuple(edges[2 * (rank - 1 - n)] for n in range(rank))
            edges = tuple(n for low, high in zip(edges[::2], edges[1::2], strict=True) for n in (0, high - low))
        else:
            padding, edges = tuple(module.padding), ()
        if not any(edges):
            edges = ()
        return cls(tuple(module.stride), padding, tuple(module.dilation), module.groups, edges, mode)

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels, counted from the end: an input may lack the batch dimension."""
        return -1 - len(self.stride)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = _CONVOLUTIONS[len(self.stride)]
        return convolve(self._padded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def select(self, x: Tensor, indices: Tensor, runs: Runs | None) -> Tensor:
        """The channels that the columns read, `(batch, groups * r, *space)`, before padding."""
        dim = self.channel_dim
        return x.index_select(dim, self._channels(indices, x.shape[dim]))

    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        rank = len(self.stride)
        low_and_high = list(zip(self.edges[::2], self.edges[1::2], strict=True))[::-1] or [(0, 0)] * rank
        space = [size + low + high for size, (low, high) in zip(input_size[-rank:], low_and_high, strict=True)]
        rows = grad_output if grad_output.dim() == rank + 2 else grad_output[None]
        # The input's values do not matter to its own gradient, only its size does.
        x = grad_output.new_empty(1).expand(rows.shape[0], input_size[-rank - 1], *space)
        padded = self._backward(rows, x, weight.to(grad_output.dtype), (True, False, False))[0]
        gradient = padded if grad_output.dim() == rank + 2 else padded[0]
        for n, (size, (low, high)) in enumerate(zip(input_size[-rank:], low_and_high, strict=True)):
            if low or high:
                gradient = _unpad(gradient, n - rank, size, low, high, self.mode)
        return gradient

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        if selected.dim() == len(self.stride) + 1:
            grad_output, selected = grad_output[None], selected[None]
        weight = grad_output.new_empty(1).expand(size)
        gradient = self._backward(grad_output, self._padded(selected), weight, (False, True, False))[1]
        return scaled(gradient.to(dtype), scale)

    def bias_gradient(self, grad_output: Tensor) -> Tensor:
        return super().bias_gradient(grad_output.movedim(self.channel_dim, -1))

    def add_contribution(self, y: Tensor, selected: Tensor, indices: Tensor, delta: Tensor, scale: float) -> Tensor:
        if not selected.numel():
            return y.clone()
        return torch.add(y, self.apply(selected, delta.to(y.dtype), None), alpha=scale)

    def add_input_gradient(
        self, grad_x: Tensor, grad_output: Tensor, indices: Tensor, delta: Tensor, scale: float
    ) -> None:
        dim = self.channel_dim
        channels = self._channels(indices, grad_x.shape[dim])
        size = list(grad_x.shape)
        size[dim] = channels.numel()
        grad_x.index_add_(dim, channels, self.input_gradient(grad_output, delta, torch.Size(size)), alpha=scale)

    def _channels(self, indices: Tensor, in_channels: int) -> Tensor:
        """The numbers of the channels that the columns read, `(groups * r,)`, group by group."""
        if self.groups == 1:
            return indices
        first = torch.arange(self.groups, device=indices.device) * (in_channels // self.groups)
        return (first[:, None] + indices).reshape(-1)

    def _padded(self, x: Tensor) -> Tensor:
        """`x` with the edges that the convolution does not add itself."""
        return F.pad(x, self.edges, self.mode) if self.edges else x

    def _backward(
        self, grad_output: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        moves, nothing = (self.stride, self.padding, self.dilation), (0,) * len(self.stride)
        return torch.ops.aten.convolution_backward(
            grad_output, x, weight, None, *moves, False, nothing, self.groups, mask
        )


def _unpad(gradient: Tensor, dim: int, size: int, low: int, high: int, mode: str) -> Tensor:
    """The gradient of what was padded along `dim`.

    torch's own padding operators keep their whole input for this (reflect and replicate do), though only its size
    matters.
    """
    if mode == "constant":
        return gradient.narrow(dim, low, size)
    places = F.pad(torch.arange(size, dtype=torch.float64, device="cpu")[None, None], (low, high), mode)[0, 0]
    places = places.to(device=gradient.device, dtype=torch.int64)
    shape = list(gradient.shape)
    shape[dim] = size
    return gradient.new_zeros(shape).index_add_(dim, places, gradient)

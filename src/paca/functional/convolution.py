"""The partially trained convolution: plain tensors in, plain tensors out.

A column is an input channel: of ``weight (out_channels, in_channels / groups, *kernel)`` the slices
``weight[:, indices]`` are trained. As in ``linear``, they already sit inside the weight, which is never written
here, and the selected channels of the input are the only activation kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros on both sides of each spatial dimension, added by the convolution itself."""
    dilation: tuple[int, ...]
    groups: int
    edges: tuple[int, ...]
    """What is padded before, as ``F.pad`` takes it (last dimension first); empty for nothing."""
    mode: str
    """Of ``F.pad``."""

    @classmethod
    def of(cls, module: Any) -> Geometry:
        """The geometry of an ``nn.Conv1d``, ``Conv2d`` or ``Conv3d``, which it computes with the same operators."""
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

    def output_size(self, input_size: Sequence[int], out_channels: int, kernel: Sequence[int]) -> list[int]:
        """The size of the output for an input ``(batch, channels, *space)`` or ``(channels, *space)``."""
        rank = len(self.stride)
        edges = self.edges or (0,) * (2 * rank)
        space = []
        for n, size in enumerate(input_size[-rank:]):
            around = edges[2 * (rank - 1 - n)] + edges[2 * (rank - 1 - n) + 1] + 2 * self.padding[n]
            space.append((size + around - self.dilation[n] * (kernel[n] - 1) - 1) // self.stride[n] + 1)
        return [*input_size[: -rank - 1], out_channels, *space]


def partial_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
    scales: Sequence[float],
    *,
    geometry: Geometry,
    before_backward: Callable[[int], None],
    state_tag: Tensor,
) -> Tensor:
    """Convolve ``x`` with ``weight``; send gradients to ``x``, ``bias`` and the columns' ``deltas``.

    Args:
        x: ``(batch, in_channels, *space)`` or ``(in_channels, *space)``; 1 to 3 spatial dimensions.
        weight: ``(out_channels, in_channels / groups, *kernel)``, already holding the columns. Must not require grad.
        bias: ``(out_channels,)`` or None.
        deltas: one ``(out_channels, r_a, *kernel)`` per adapter.
        indices: one ``(r_a,)`` int64 per adapter. With groups, column ``j`` is the ``j``-th input channel of every
            group.
        scales: one factor per adapter, ``paca_alpha / r``.
        geometry: stride, padding, dilation and groups.
        before_backward: called with the saved tag before ``weight`` is read in the backward pass; it has to put the
            columns of the forward pass back.
        state_tag: a scalar tensor that names the columns ``weight`` holds now; saved with the activations.

    Returns:
        ``(batch, out_channels, *space)`` or ``(out_channels, *space)``, as the stock module's.

    Raises:
        ValueError: if ``weight`` requires grad.
    """
    if weight.requires_grad:
        raise ValueError(
            "The weight of an adapted convolution requires grad, but PaCA trains its columns only. Call "
            "weight.requires_grad_(False), or train the layer whole through modules_to_save."
        )
    return _PartialConvolution.apply(
        x, weight, bias, geometry, tuple(scales), before_backward, state_tag, *indices, *deltas
    )


def plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """What the stock module computes, with its own operators, so that results agree bitwise."""
    stride, padding, dilation, groups, _, _ = geometry
    return _CONVOLUTIONS[len(stride)](pad(x, geometry), weight, bias, stride, padding, dilation, groups)


def selected_channels(x: Tensor, indices: Tensor, geometry: Geometry) -> Tensor:
    """The channels of ``x`` that the columns ``indices (r,)`` read: ``groups * r`` of them, group by group."""
    dim = geometry.channel_dim
    return x.index_select(dim, channels_of(indices, x.shape[dim], geometry))


def channels_of(indices: Tensor, in_channels: int, geometry: Geometry) -> Tensor:
    """The numbers of those channels, ``(groups * r,)``."""
    groups = geometry.groups
    if groups == 1:
        return indices
    first = torch.arange(groups, device=indices.device) * (in_channels // groups)
    return (first[:, None] + indices).reshape(-1)


class _PartialConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        scales: tuple[float, ...],
        before_backward: Callable[[int], None],
        state_tag: Tensor,
        *indices_then_deltas: Tensor,
    ) -> Tensor:
        count = len(scales)
        indices, deltas = indices_then_deltas[:count], indices_then_deltas[count:]
        y = plain_convolution(x, weight, bias, geometry)
        needed = ctx.needs_input_grad[7 + count :]
        kept = [selected_channels(x, i, geometry).to(y.dtype) for i, need in zip(indices, needed, strict=True) if need]
        ctx.weight = weight  # no version check: before_backward puts the right columns back
        ctx.geometry, ctx.scales, ctx.before_backward = geometry, scales, before_backward
        ctx.input_size, ctx.input_dtype, ctx.compute_dtype = x.shape, x.dtype, y.dtype
        ctx.delta_dtypes = tuple(d.dtype for d in deltas)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(state_tag, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, *kept = ctx.saved_tensors
        ctx.before_backward(int(tag))
        with torch.autocast(grad_output.device.type, enabled=False):
            return _gradients(ctx, grad_output.to(ctx.compute_dtype), kept)


def _gradients(ctx: Any, grad_output: Tensor, kept: list[Tensor]) -> tuple[Any, ...]:
    count = len(ctx.scales)
    kernel = ctx.weight.shape[2:]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = input_gradient(grad_output, ctx.weight, ctx.input_size, ctx.geometry).to(ctx.input_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = bias_gradient(grad_output, ctx.geometry).to(ctx.bias_dtype)
    grad_deltas: list[Tensor | None] = []
    remaining = iter(kept)
    for need, scale, dtype in zip(ctx.needs_input_grad[7 + count :], ctx.scales, ctx.delta_dtypes, strict=True):
        grad_deltas.append(
            column_gradient(grad_output, next(remaining), kernel, ctx.geometry, scale, dtype) if need else None
        )
    return grad_x, None, grad_bias, None, None, None, None, *([None] * count), *grad_deltas


def bias_gradient(grad_output: Tensor, geometry: Geometry) -> Tensor:
    """``grad_output`` summed over all but its channels: ``(out_channels,)``."""
    channels = grad_output.movedim(geometry.channel_dim, -1)
    return channels.reshape(-1, channels.shape[-1]).sum(0)


def input_gradient(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], geometry: Geometry) -> Tensor:
    """The gradient of the input, of ``input_size``, in ``grad_output``'s dtype."""
    rank = len(geometry.stride)
    low_and_high = list(zip(geometry.edges[::2], geometry.edges[1::2], strict=True))[::-1] or [(0, 0)] * rank
    space = [size + low + high for size, (low, high) in zip(input_size[-rank:], low_and_high, strict=True)]
    rows = grad_output if grad_output.dim() == rank + 2 else grad_output[None]
    # The input's values do not matter to its own gradient, only its size does.
    x = grad_output.new_empty(1).expand(rows.shape[0], input_size[-rank - 1], *space)
    padded = _convolution_backward(rows, x, weight.to(grad_output.dtype), geometry, (True, False, False))[0]
    gradient = padded if grad_output.dim() == rank + 2 else padded[0]
    for n, (size, (low, high)) in enumerate(zip(input_size[-rank:], low_and_high, strict=True)):
        if low or high:
            gradient = _unpad(gradient, n - rank, size, low, high, geometry.mode)
    return gradient


def column_gradient(
    grad_output: Tensor,
    selected: Tensor,
    kernel: Sequence[int],
    geometry: Geometry,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a delta, ``(out_channels, r, *kernel)``.

    Args:
        grad_output: ``(batch, out_channels, *space)`` or without the batch dimension.
        selected: the columns' channels of the input, ``(batch, groups * r, *space)``, before padding.
        kernel: the kernel's size.
        geometry: of the convolution.
        scale: ``paca_alpha / r``.
        dtype: of the delta.
    """
    rank = len(geometry.stride)
    r = selected.shape[geometry.channel_dim] // geometry.groups
    out_channels = grad_output.shape[geometry.channel_dim]
    if selected.dim() == rank + 1:
        grad_output, selected = grad_output[None], selected[None]
    weight = grad_output.new_empty(1).expand(out_channels, r, *kernel)
    gradient = _convolution_backward(grad_output, pad(selected, geometry), weight, geometry, (False, True, False))[1]
    gradient = gradient.to(dtype)
    return gradient * scale if scale != 1.0 else gradient


def _convolution_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups, _, _ = geometry
    nothing = (0,) * len(stride)
    return torch.ops.aten.convolution_backward(
        grad_output, x, weight, None, stride, padding, dilation, False, nothing, groups, mask
    )


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    """``x`` with the edges that the convolution does not add itself."""
    return F.pad(x, geometry.edges, geometry.mode) if geometry.edges else x


def _unpad(gradient: Tensor, dim: int, size: int, low: int, high: int, mode: str) -> Tensor:
    """The gradient of what was padded along ``dim``.

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

"""PaCA for convolutions: ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``. A column is an input channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.state import Columns, State
from paca.functional.convolution import (
    Geometry,
    column_gradient,
    input_gradient,
    partial_convolution,
    plain_convolution,
    selected_channels,
)
from paca.functional.convolution_by_row import ConvolutionProduct
from paca.layers.base import PacaLayer
from paca.layers.compiled_weight import OpaqueWeight
from paca.layers.resident_weight import ResidentWeight


class ResidentConvolution(OpaqueWeight):
    """A convolution with resident columns ``weight[:, indices]``, weight ``(out_channels, in_channels / groups, *k)``.

    With groups, column ``j`` is the ``j``-th input channel of every group.
    """

    input_dim = 1

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        convolution: Any = module
        if convolution.groups > 1 and convolution.in_channels == convolution.groups:
            return (
                f"is a depthwise convolution (groups={convolution.groups}): each output reads one input channel, so "
                "one column would be the whole weight. Train it whole through modules_to_save, or leave it out of "
                "target_modules."
            )
        return None

    def _run_partial(self, x: Tensor, state: State) -> Tensor:
        return partial_convolution(
            x,
            self.weight,
            self.bias,
            self._deltas_of(state),
            state.indices,
            state.scales,
            geometry=Geometry.of(self),
            before_backward=self._before_backward(state),
            state_tag=state.tag_tensor,
        )

    # -- within a compiled graph ----------------------------------------------------------------------------------

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type) and torch.float64 not in (x.dtype, self.weight.dtype):
            return torch.get_autocast_dtype(device_type)
        if x.dtype != self.weight.dtype:
            raise RuntimeError(f"the input is {x.dtype}, but the layer's weight is {self.weight.dtype}")
        return x.dtype

    def output_size(self, x: Tensor) -> list[int]:
        return Geometry.of(self).output_size(x.shape, self.weight.shape[0], self.weight.shape[2:])

    def keep(self, x: Tensor, indices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [selected_channels(x, i, Geometry.of(self)).to(dtype) for i in indices]

    def run_plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        bias = None if self.bias is None else self.bias.to(dtype)
        return plain_convolution(x.to(dtype), self.weight.to(dtype), bias, Geometry.of(self))

    def input_gradient(self, grad_output: Tensor, input_size: Sequence[int]) -> Tensor:
        return input_gradient(grad_output, self.weight, input_size, Geometry.of(self))

    def column_gradients(
        self, grad_output: Tensor, kept: Sequence[Tensor], columns: Sequence[Columns], dtype: torch.dtype
    ) -> list[Tensor]:
        geometry, kernel = Geometry.of(self), self.weight.shape[2:]
        return [
            column_gradient(grad_output, selected, kernel, geometry, c.scale, dtype)
            for selected, c in zip(kept, columns, strict=True)
        ]


class ResidentConv1d(ResidentConvolution, nn.Conv1d):
    """An ``nn.Conv1d`` with resident columns."""

    stock_class = nn.Conv1d
    channel_dim = -2


class ResidentConv2d(ResidentConvolution, nn.Conv2d):
    """An ``nn.Conv2d`` with resident columns."""

    stock_class = nn.Conv2d
    channel_dim = -3


class ResidentConv3d(ResidentConvolution, nn.Conv3d):
    """An ``nn.Conv3d`` with resident columns."""

    stock_class = nn.Conv3d
    channel_dim = -4


RESIDENT_CLASSES: dict[type[nn.Module], type[ResidentWeight]] = {
    nn.Conv1d: ResidentConv1d,
    nn.Conv2d: ResidentConv2d,
    nn.Conv3d: ResidentConv3d,
}


_OF_A_CONVOLUTION = {
    "dilation",
    "groups",
    "in_channels",
    "kernel_size",
    "out_channels",
    "output_padding",
    "padding",
    "padding_mode",
    "stride",
}


class PacaConvolution(PacaLayer):
    """The adapted convolution: keeps each adapter's deltas ``(out_channels, r, *kernel)`` and indices."""

    delta_axes = "(out_channels, r, *kernel)"

    input_axes = "(samples, in_channels, *space)"

    def __getattr__(self, name: str) -> Any:
        # Models read these of their convolutions, Whisper's encoder for one.
        return getattr(self.base_layer, name) if name in _OF_A_CONVOLUTION else super().__getattr__(name)

    @property
    def input_dims(self) -> int:
        return self.base_layer.weight.dim()  # one fewer is a single sample without a batch dimension

    def row_product(self) -> ConvolutionProduct:
        return ConvolutionProduct(Geometry.of(self.base_layer))

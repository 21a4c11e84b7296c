"""PaCA for convolutions: `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`. A column is an input channel."""

from __future__ import annotations

from typing import Any

from torch import nn

from paca.functional.convolution import ConvolutionProduct
from paca.layers.base import PacaLayer
from paca.layers.resident_weight import ResidentWeight


class ResidentConvolution(ResidentWeight):
    """A convolution with resident columns `weight[:, indices]`, weight `(out_channels, in_channels / groups, *k)`.

    With groups, column `j` is the `j`-th input channel of every group.
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

    def product(self) -> ConvolutionProduct:
        return ConvolutionProduct.of(self)


class ResidentConv1d(ResidentConvolution, nn.Conv1d):
    """An `nn.Conv1d` with resident columns."""

    stock_class = nn.Conv1d


class ResidentConv2d(ResidentConvolution, nn.Conv2d):
    """An `nn.Conv2d` with resident columns."""

    stock_class = nn.Conv2d


class ResidentConv3d(ResidentConvolution, nn.Conv3d):
    """An `nn.Conv3d` with resident columns."""

    stock_class = nn.Conv3d


class PacaConvolution(PacaLayer):
    """The adapted convolution: keeps each adapter's deltas `(out_channels, r, *kernel)` and indices."""

    delta_axes = "(out_channels, r, *kernel)"
    input_axes = "(samples, in_channels, *space)"
    multiplies_a_matrix = False

    def __getattr__(self, name: str) -> Any:
        # Models read these of their convolutions, Whisper's encoder for one.
        return getattr(self.base_layer, name) if name in nn.Conv1d.__constants__ else super().__getattr__(name)

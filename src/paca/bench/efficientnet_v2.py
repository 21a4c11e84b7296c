"""EfficientNetV2-L (Tan & Le 2021, arXiv 2104.00298, table 4 scaled to L) in plain torch.

The shape of the published model: 118,515,272 parameters. Stochastic depth is left out: it regularizes, and would make
one step differ from the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class _Stage(NamedTuple):
    fused: bool
    expand: int
    stride: int
    out_channels: int
    repeats: int


_STEM_CHANNELS, _HEAD_CHANNELS = 32, 1280
_STAGES = (
    _Stage(True, 1, 1, 32, 4),
    _Stage(True, 4, 2, 64, 7),
    _Stage(True, 4, 2, 96, 7),
    _Stage(False, 4, 2, 192, 10),
    _Stage(False, 6, 1, 224, 19),
    _Stage(False, 6, 2, 384, 25),
    _Stage(False, 6, 1, 640, 7),
)


class EfficientNetV2L(nn.Module):
    """Images `(batch, 3, height, width)` to logits `(batch, num_labels)`."""

    def __init__(self, num_labels: int = 1000) -> None:
        super().__init__()
        self.stem = _convolution(3, _STEM_CHANNELS, kernel=3, stride=2)
        blocks: list[nn.Module] = []
        channels = _STEM_CHANNELS
        for stage in _STAGES:
            kind = _FusedBlock if stage.fused else _Block
            for number in range(stage.repeats):
                blocks.append(kind(channels, stage.out_channels, stage.expand, stage.stride if number == 0 else 1))
                channels = stage.out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(channels, _HEAD_CHANNELS, kernel=1)
        self.classifier = nn.Linear(_HEAD_CHANNELS, num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(pixel_values)))
        return self.classifier(F.dropout(features.mean((2, 3)), 0.4, self.training))


def _convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-3),
    ]
    return nn.Sequential(*layers, *([nn.SiLU()] if activation else []))


class _FusedBlock(nn.Module):
    """Expansion and depthwise convolution in one full convolution."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expand
        self.residual = stride == 1 and in_channels == out_channels
        if expand == 1:
            self.layers = _convolution(in_channels, out_channels, kernel=3, stride=stride)
        else:
            self.layers = nn.Sequential(
                _convolution(in_channels, wide, kernel=3, stride=stride),
                _convolution(wide, out_channels, kernel=1, activation=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class _Block(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, in_channels: int, out_channels: int, expand: int, stride: int) -> None:
        super().__init__()
        wide, squeezed = in_channels * expand, in_channels // 4
        self.residual = stride == 1 and in_channels == out_channels
        self.expansion = _convolution(in_channels, wide, kernel=1)
        self.depthwise = _convolution(wide, wide, kernel=3, stride=stride, groups=wide)
        self.squeeze = nn.Conv2d(wide, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, wide, 1)
        self.projection = _convolution(wide, out_channels, kernel=1, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expansion(x))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.projection(y * gate.sigmoid())
        return x + y if self.residual else y

"""Small networks of adapted convolutions and embeddings, and what is expected of any adapted layer in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import adapt

TARGETS = ["first", "second", "third"]


class Images(nn.Module):
    """Three convolutions: with padding, grouped with stride, and pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(8, 6, 3, padding="same", groups=2, dilation=2)
        self.third = nn.Conv2d(6, 5, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Words(nn.Module):
    """An embedding, a one-dimensional convolution, and a second embedding that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(11, 6, padding_idx=0)
        self.second = nn.Conv1d(6, 5, 3, padding=2, padding_mode="circular")
        self.third = nn.Embedding(11, 5, scale_grad_by_freq=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(tokens)).transpose(1, 2))[..., 1:-1] + self.third(tokens).mT


class Volume(nn.Module):
    """Three three-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 2)
        self.second = nn.Conv3d(4, 4, (1, 2, 3), padding="same")
        self.third = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


NETWORKS = {"images": Images, "words": Words, "volume": Volume}


def network(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[kind]().to(dtype)


def example(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "words":
        return torch.randint(0, 11, (3, 8), generator=generator)
    shape = {"images": (2, 3, 9, 8), "volume": (2, 3, 4, 3, 5)}[kind]
    return torch.randn(shape, generator=generator).to(dtype)


def adapted_network(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return adapt(network(kind, dtype), **{"r": 2, "paca_alpha": 4, "target_modules": TARGETS, **settings})

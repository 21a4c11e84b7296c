"""A row of the matrix: a tiny model whose adapted layers are of one kind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A kind of layer or of quantization.

    Everything it makes is the same each time: the same values, the same inputs.
    """

    key: str
    title: str
    """As the document shows it, in Markdown."""
    modes: frozenset[str]
    """How its layers' columns take effect."""
    base: Callable[[Path], nn.Module]
    """The model before it is adapted, as its user has it; may leave files in the folder given."""
    plain: Callable[[], nn.Module]
    """What computes the same, of stock layers in float32 with the same names."""
    inputs: Callable[[], Tensor]
    """Three samples."""
    targets: dict[str, Any]
    """The settings of a `PacaConfig` that select the layers."""
    column_dim: int = 1
    """The dimension of the weight that runs over its columns."""
    package: str | None = None
    """What has to be installed."""
    stock_training: bool = False
    """Whether the base model has to be in training mode to compute what it computes when it is adapted."""
    compiled: Callable[[Any], list[nn.Module]] = field(default=lambda model: [])
    """The parts of the base model that are compiled; the whole of it if there are none (a whole one takes seconds)."""
    loading: Callable[[Path], dict[str, Any]] = field(default=lambda folder: {})
    """What `PeftModel.from_pretrained` is told on top, on this kind of model."""

    language_model: Callable[[Path], nn.Module] | None = None
    """A Llama or GPT-2 model whose layers are of this kind, if `base` is no language model, but could be one."""

    def missing(self) -> str | None:
        """What it needs that is not here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"needs the package {self.package}"
        return None


@dataclass(frozen=True)
class Refused:
    """A kind of layer that is not adapted at all: that raises, and says why."""

    key: str
    title: str
    base: Callable[[], nn.Module]
    targets: dict[str, Any]
    package: str | None = None

    missing = Subject.missing


class Pair(nn.Module):
    """`first`, tanh, `second`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> Pair:
    """Made of layers with random values, biases too."""
    torch.manual_seed(0)
    model = Pair(first(), second())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))

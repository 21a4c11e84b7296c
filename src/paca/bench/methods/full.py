"""Full fine-tuning."""

from __future__ import annotations

from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Train every parameter."""
    return model.requires_grad_(True)


METHOD = Method("full", "every parameter is trained", prepare)

"""PaCA in memory-lean blocks that compute the MLP's gate and up again in the backward pass."""

from __future__ import annotations

from torch import nn

from paca.bench.method import Adaptation, Method
from paca.bench.methods import paca as stock
from paca.lean import make_lean


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Make the blocks lean with recomputation, then put PaCA in."""
    return stock.prepare(make_lean(model, recompute="mlp"), adaptation)


METHOD = Method("paca+lean+recompute", "PaCA, lean blocks, gate and up computed twice", prepare)

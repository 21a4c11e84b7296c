"""PaCA in memory-lean blocks."""

from __future__ import annotations

from torch import nn

from paca.bench.method import Adaptation, Method
from paca.bench.methods import paca as stock
from paca.lean import make_lean


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Make the blocks lean, then put PaCA in."""
    return stock.prepare(make_lean(model), adaptation)


METHOD = Method("paca+lean", "PaCA, lean RMSNorm and MLP", prepare)

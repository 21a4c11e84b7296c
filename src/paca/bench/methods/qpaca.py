"""PaCA above 4-bit weights, the trained columns in 16 or 32 bits."""

from __future__ import annotations

import peft
from torch import nn

import paca
from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put PaCA into the quantized layers."""
    config = paca.PacaConfig(r=adaptation.rank, target_modules=adaptation.targets)
    return peft.get_peft_model(model, config)


METHOD = Method("qpaca", "PaCA on NF4 weights", prepare, four_bit=True)

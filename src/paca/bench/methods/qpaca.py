"""QPaCA: PaCA above NF4 weights, the trained columns written in 16 bits into what each matmul dequantizes."""

from __future__ import annotations

import peft
from torch import nn

import paca
from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put PaCA into the quantized layers."""
    config = paca.PacaConfig(r=adaptation.rank, target_modules=adaptation.targets)
    return peft.get_peft_model(model, config)


METHOD = Method("qpaca", "PaCA on NF4 weights, patched columns", prepare, four_bit=True)

"""VeRA: random projections shared by all layers, trained scaling vectors."""

from __future__ import annotations

import peft
from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put VeRA into the targets with PEFT's default r of 256: it counts shared projections, not trained columns."""
    config = peft.VeraConfig(target_modules=adaptation.targets)
    return peft.get_peft_model(model, config)


METHOD = Method("vera", "VeRA, PEFT's defaults (r=256)", prepare)

"""DoRA: LoRA with a trained magnitude per output."""

from __future__ import annotations

import peft
from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put DoRA of the run's rank into the targets."""
    config = peft.LoraConfig(r=adaptation.rank, target_modules=adaptation.targets, use_dora=True)
    return peft.get_peft_model(model, config)


METHOD = Method("dora", "DoRA, PEFT's defaults, same rank", prepare)

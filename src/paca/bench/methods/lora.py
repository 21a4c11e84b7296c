"""LoRA with PEFT's defaults: float32 adapters above half-precision weights."""

from __future__ import annotations

import peft
from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put LoRA of the run's rank into the targets."""
    config = peft.LoraConfig(r=adaptation.rank, target_modules=adaptation.targets)
    return peft.get_peft_model(model, config)


METHOD = Method("lora", "LoRA, PEFT's defaults, same rank", prepare)

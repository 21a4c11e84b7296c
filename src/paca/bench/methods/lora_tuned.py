"""LoRA at its best: adapters in the dtype of the weights, so that nothing is cast."""

from __future__ import annotations

import peft
from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put LoRA of the run's rank, in the weights' dtype, into the targets."""
    config = peft.LoraConfig(r=adaptation.rank, target_modules=adaptation.targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


METHOD = Method("lora-tuned", "LoRA, adapters in the weights' dtype, same rank", prepare, autocast_adapter_dtype=False)

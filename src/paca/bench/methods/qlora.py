"""QLoRA: LoRA above NF4 weights."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from paca.bench.method import Adaptation, Method


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put LoRA of the run's rank, with PEFT's defaults, into the quantized layers."""
    marked: Any = model
    marked.is_loaded_in_4bit = True  # how PEFT tells such a model
    config = peft.LoraConfig(r=adaptation.rank, target_modules=adaptation.targets)
    return peft.get_peft_model(marked, config)


METHOD = Method("qlora", "LoRA on NF4 weights, PEFT's defaults, same rank", prepare, four_bit=True)

"""LoRA with the rank that gives as many trainable parameters as PaCA has."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from paca.bench.method import Adaptation, Method
from paca.bench.methods import lora
from paca.bench.targets import rank_of_equal_size


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put LoRA into the targets at PaCA's number of trainable parameters."""
    return lora.prepare(model, replace(adaptation, rank=rank_of_equal_size(model, adaptation)))


METHOD = Method("lora-same-parameters", "LoRA, PEFT's defaults, as many parameters as PaCA", prepare)

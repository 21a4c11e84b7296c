"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A stays at its random start, B is trained."""

from __future__ import annotations

from torch import nn

from paca.bench.method import Adaptation, Method
from paca.bench.methods import lora


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put LoRA in and freeze every A."""
    model = lora.prepare(model, adaptation)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


METHOD = Method("lora-fa", "LoRA with A frozen, PEFT's defaults", prepare)

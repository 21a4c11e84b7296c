"""LoRA in the weights' dtype, with the rank that gives as many trainable parameters as PaCA has."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from paca.bench.method import Adaptation, Method
from paca.bench.methods import lora_tuned
from paca.bench.targets import rank_of_equal_size


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put tuned LoRA into the targets at PaCA's number of trainable parameters."""
    return lora_tuned.prepare(model, replace(adaptation, rank=rank_of_equal_size(model, adaptation)))


METHOD = Method(
    "lora-tuned-same-parameters",
    "LoRA, adapters in the weights' dtype, as many parameters as PaCA",
    prepare,
    autocast_adapter_dtype=False,
)

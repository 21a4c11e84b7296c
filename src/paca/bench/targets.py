"""Which modules of a model the methods adapt, and how large an adapter of them is."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from paca.bench.method import Adaptation, MethodUnavailable


def target_modules(model: nn.Module) -> str | list[str]:
    """What PEFT's `target_modules` takes: `"all-linear"` for a transformers model; else every linear layer and every
    ungrouped convolution but the classifier (a depthwise convolution has no low-rank or column structure to train)."""
    if isinstance(model, PreTrainedModel):
        return "all-linear"
    return [
        name
        for name, module in model.named_modules()
        if name != "classifier"
        and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
    ]


def narrow_ranks(model: nn.Module, adaptation: Adaptation) -> dict[str, int]:
    """PaCA's rank in the convolutions that have fewer input channels than the rank (an image has 3): all of them."""
    if isinstance(adaptation.targets, str):
        return {}
    channels = {n: m.in_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {re.escape(n): channels[n] for n in adaptation.targets if channels.get(n, adaptation.rank) < adaptation.rank}


def rank_of_equal_size(model: nn.Module, adaptation: Adaptation) -> int:
    """The rank at which LoRA, `rank × (in + out)` per layer, comes closest to PaCA's `r × out`; at least 1.

    Raises:
        MethodUnavailable: the targets are not linear layers alone.
    """
    if adaptation.targets != "all-linear":
        raise MethodUnavailable("an equal number of parameters is defined for linear layers only")
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]
    columns = sum(layer.out_features for layer in layers)
    both = sum(layer.in_features + layer.out_features for layer in layers)
    return max(1, round(adaptation.rank * columns / both))

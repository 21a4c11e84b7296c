"""What one transformer block costs, apart from what the model does once."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from paca.bench.base_model import BaseModel
from paca.bench.step import TrainingStep, inner_model


def per_layer(measure: Callable[[], float], step: TrainingStep, base: BaseModel) -> float | None:
    """Measure with all blocks and with the first alone; the difference, divided by the blocks left out.

    So the final norm, the loss and the rotary embeddings, which a model has once, don't count.

    Args:
        measure: Runs the step or a part of it.
        step: Its model loses all blocks but the first meanwhile.
        base: The model that it started from.

    Returns:
        None for a model with fewer than two blocks.
    """
    if base.layers < 2:
        return None
    whole = measure()
    found = [
        (module, name, child)
        for module in inner_model(step.model).modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == base.layers
    ]
    if len(found) != 1:
        raise ValueError(f"expected one list of {base.layers} blocks in {type(step.model).__name__}, got {len(found)}")
    parent, name, blocks = found[0]
    setattr(parent, name, blocks[:1])
    try:
        return (whole - measure()) / (base.layers - 1)
    finally:
        setattr(parent, name, blocks)

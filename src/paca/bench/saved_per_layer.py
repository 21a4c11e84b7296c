"""Saved activations of one transformer block, apart from what the model saves once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from paca.bench.base_model import BaseModel
from paca.bench.saved_activations import measure_saved_activations
from paca.bench.settings import Point
from paca.bench.step import TrainingStep, inner_model


@dataclass(frozen=True)
class SavedPerLayer:
    """What one block keeps for the backward pass."""

    bytes_per_token: float
    units: float
    """The same in units of `hidden × element size`, the bytes of one token's hidden state: independent of the width,
    and in half precision the `h × 2 bytes` of the design."""


def measure_saved_per_layer(step: TrainingStep, base: BaseModel, point: Point) -> SavedPerLayer | None:
    """Measure with all blocks and with the first alone; the difference, divided by the blocks left out.

    So the final norm, the loss and the rotary embeddings, which a model saves once, don't count.

    Returns:
        None for a model without at least two blocks in a list.
    """
    if base.layers < 2:
        return None
    whole = measure_saved_activations(step.forward, step.model).bytes
    with _first_block_only(inner_model(step.model), base.layers):
        single = measure_saved_activations(step.forward, step.model).bytes
    tokens = point.batch * (point.seq or 1)
    per_token = (whole - single) / (base.layers - 1) / tokens
    return SavedPerLayer(per_token, per_token / (base.hidden_size * step.element_size))


@contextmanager
def _first_block_only(model: nn.Module, layers: int) -> Iterator[None]:
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == layers
    ]
    if len(found) != 1:
        raise ValueError(f"expected one list of {layers} blocks in {type(model).__name__}, found {len(found)}")
    parent, name, blocks = found[0]
    setattr(parent, name, blocks[:1])
    try:
        yield
    finally:
        setattr(parent, name, blocks)

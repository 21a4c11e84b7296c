"""Writing the weights when nothing else would notice that they are stale."""

from __future__ import annotations

from torch import nn

from paca.layers.base import paca_layers
from paca.tuner.entry import ModelEntry, write_layers


def refresh(model: nn.Module) -> None:
    """Write the deltas into the weights now, whatever their version counters say.

    Needed only after a delta was written through `.data` (or by a foreign kernel) with neither a step, a backward pass
    nor a change of mode around it; and before a call of a function of your own that you compiled around the model,
    after deltas were written by hand.

    Args:
        model: The adapted model, or any module that holds adapted layers.
    """
    layers = paca_layers(model)
    write_layers(layers, compare=True)
    for entry in {layer.base_layer.columns.entry for layer in layers if layer.mode == "resident"}:
        if isinstance(entry, ModelEntry) and set(entry.layers) <= set(layers):
            entry.unwritten = entry.mixed_batches > 0

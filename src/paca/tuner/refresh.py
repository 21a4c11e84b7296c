"""Writing what nothing shows: `paca.refresh`."""

from __future__ import annotations

from torch import nn

from paca.layers.base import paca_layers
from paca.layers.mixed_batch import Running
from paca.tuner.entry import ModelEntry, write_layers


def refresh(model: nn.Module) -> None:
    """Write the deltas into the weights now, whatever their version counters say.

    Needed only after a delta was written through `.data` (or by a foreign kernel), without a step, a backward pass or a
    change of mode around it; and after you wrote deltas by hand, before calls of what you compiled around the model.

    Args:
        model: The adapted model, or any module that holds adapted layers.
    """
    layers = paca_layers(model)
    write_layers(layers, compare=True)
    for entry in {layer.base_layer.columns.entry for layer in layers if layer.mode == "resident"}:
        if isinstance(entry, ModelEntry) and set(entry.layers) <= set(layers):
            entry.unwritten = any(batch.entry is entry for batch in Running.batches)

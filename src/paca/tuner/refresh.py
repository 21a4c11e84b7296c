"""Writing what nothing shows: `paca.refresh`."""

from __future__ import annotations

from torch import nn

from paca.layers.base import PacaLayer, paca_layers
from paca.layers.mixed_batch import Running
from paca.tuner.entry import ModelEntry, write_layers


def refresh(model: nn.Module) -> None:
    """Write the deltas into the weights now, whatever their version counters say.

    Needed only after a delta was written through `.data` (or by a foreign kernel), without a step, a backward pass or a
    change of mode around it; and after you wrote deltas by hand, before calls of what you compiled around the model.

    A pending backward pass of an adapter that is not active raises afterwards: its delta may have been written too.

    Args:
        model: The adapted model, or any module that holds adapted layers.
    """
    layers = paca_layers(model)
    for layer in layers:
        _doubt_unwritten(layer)
    write_layers(layers, compare=True)
    for entry in {layer.base_layer.columns.entry for layer in layers if layer.mode == "resident"}:
        if isinstance(entry, ModelEntry) and set(entry.layers) <= set(layers):
            entry.unwritten = any(batch.entry is entry for batch in Running.batches)


def _doubt_unwritten(layer: PacaLayer) -> None:
    """Let deltas count as changed that lie in no weight, and were not parked just now: nothing tells if they were."""
    columns = layer.base_layer.columns
    held = columns.parked[0] if columns.parked is not None else columns.state
    written = {id(c.parameter) for c in held.columns}
    for name in layer.paca_delta:
        if id((its := layer.columns_of(name)).parameter) not in written:
            columns.written(its)

"""The layers that have a certain adapter."""

from __future__ import annotations

from torch import nn

from paca.layers.base import PacaLayer


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    """The layers of `model` that have an adapter, by their names in it."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PacaLayer)}
    return {name: layer for name, layer in found.items() if adapter_name in layer.paca_delta}

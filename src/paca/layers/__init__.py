"""One file per kind of layer, above a base class with the PEFT bookkeeping."""

from torch import nn

from paca.layers import convolution, embedding, experts, linear
from paca.layers.base import PacaLayer, paca_layers
from paca.layers.convolution import PacaConvolution
from paca.layers.embedding import PacaEmbedding
from paca.layers.experts import PacaExpertStack
from paca.layers.linear import PacaLinear
from paca.layers.peft_calls import refuse_sharded
from paca.layers.resident_weight import ResidentWeight

RESIDENT_CLASSES: dict[type[nn.Module], type[ResidentWeight]] = {
    **linear.RESIDENT_CLASSES,
    **convolution.RESIDENT_CLASSES,
    **embedding.RESIDENT_CLASSES,
    **experts.RESIDENT_CLASSES,
}
"""What each stock class becomes while it is adapted."""

PACA_CLASSES: dict[type[nn.Module], type[PacaLayer]] = {
    **dict.fromkeys(linear.RESIDENT_CLASSES, PacaLinear),
    **dict.fromkeys(convolution.RESIDENT_CLASSES, PacaConvolution),
    **dict.fromkeys(embedding.RESIDENT_CLASSES, PacaEmbedding),
    **dict.fromkeys(experts.RESIDENT_CLASSES, PacaExpertStack),
}
"""The layer that is put above it."""


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    """The layers of `model` that have an adapter, by their names in it."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PacaLayer)}
    return {name: layer for name, layer in found.items() if adapter_name in layer.paca_delta}


__all__ = [
    "PACA_CLASSES",
    "RESIDENT_CLASSES",
    "PacaConvolution",
    "PacaEmbedding",
    "PacaExpertStack",
    "PacaLayer",
    "PacaLinear",
    "layers_of",
    "paca_layers",
    "refuse_sharded",
]

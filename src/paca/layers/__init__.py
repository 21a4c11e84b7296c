"""One file per kind of layer, above a base class with the PEFT bookkeeping."""

from torch import nn

from paca.layers.base import PacaLayer, paca_layers
from paca.layers.convolution import PacaConvolution, ResidentConv1d, ResidentConv2d, ResidentConv3d
from paca.layers.embedding import PacaEmbedding, ResidentEmbedding
from paca.layers.experts import PacaExpertStack, ResidentStack, ResidentTransposedStack
from paca.layers.linear import PacaLinear, ResidentConv1D, ResidentLinear
from paca.layers.resident_weight import ResidentWeight

_KINDS: dict[type[PacaLayer], tuple[type[ResidentWeight], ...]] = {
    PacaLinear: (ResidentLinear, ResidentConv1D),
    PacaConvolution: (ResidentConv1d, ResidentConv2d, ResidentConv3d),
    PacaEmbedding: (ResidentEmbedding,),
    PacaExpertStack: (ResidentStack, ResidentTransposedStack),
}
RESIDENT_CLASSES = {resident.stock_class: resident for kinds in _KINDS.values() for resident in kinds}
"""What each stock class becomes while it is adapted."""
PACA_CLASSES = {resident.stock_class: layer for layer, kinds in _KINDS.items() for resident in kinds}
"""The layer that is put above it."""


def resident_class(kind: type[nn.Module]) -> type[ResidentWeight] | None:
    """What modules of a stock class become while they are adapted; None if they can't be."""
    if kind.__name__ == "FalconLinear" and kind not in RESIDENT_CLASSES and "transformers" in kind.__module__:
        from paca.layers.falcon import ResidentFalconLinear

        RESIDENT_CLASSES[kind], PACA_CLASSES[kind] = ResidentFalconLinear, PacaLinear
    return RESIDENT_CLASSES.get(kind)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    """The layers of `model` that have an adapter, by their names in it."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PacaLayer)}
    return {name: layer for name, layer in found.items() if adapter_name in layer.paca_delta}


__all__ = [
    "PACA_CLASSES",
    "RESIDENT_CLASSES",
    "PacaExpertStack",
    "PacaLayer",
    "layers_of",
    "paca_layers",
    "resident_class",
]

"""An adapter belongs to weights quantized as they were in training: its config says how."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from paca.config import PacaConfig
from paca.layers import PacaLayer
from paca.layers.overlaid import OverlaidLinear


def quantizations(layers: Iterable[PacaLayer]) -> str:
    """How the weights of ``layers`` are quantized, as a config records it."""
    found = {layer.quantization_name or "" for layer in layers if isinstance(layer, OverlaidLinear)}
    return "+".join(sorted(found - {""})) or "none"


def warn_of_another(adapter_name: str, config: PacaConfig, found: str) -> None:
    """Warn if the adapter was made for weights that are quantized otherwise than ``found``."""
    if config.base_quantization not in (None, found):  # other tools don't record it
        warnings.warn(
            f"Adapter {adapter_name!r} was made for weights quantized as {config.base_quantization!r}, but "
            f"those of this model are {found!r}. Its columns count from the weights that it was made for, so "
            "results differ. Load the base model as it was then.",
            stacklevel=3,
        )

"""An adapter belongs to weights quantized as they were in training: its config says how."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from paca.config import PacaConfig
from paca.layers import PacaLayer, layers_of
from paca.layers.overlaid import OverlaidLinear
from paca.messages.shown import shown
from paca.tuner.original_weights import OriginalWeights


def quantizations(layers: Iterable[PacaLayer]) -> str:
    """How the weights of `layers` are quantized, as a config records it."""
    found = {layer.quantization_name or "" for layer in layers if isinstance(layer, OverlaidLinear)}
    return "+".join(sorted(found - {""})) or "none"


def warn_of_another(adapter_name: str, config: PacaConfig, found: str) -> None:
    """Warn if the adapter was made for weights that are quantized otherwise than `found`."""
    if config.base_quantization not in (None, found):  # other tools don't record it
        warnings.warn(
            f"Adapter {adapter_name!r} was made for weights quantized as {config.base_quantization!r}, but "
            f"those of this model are {found!r}. Its columns count from the weights that it was made for, so "
            "results differ. Load the base model as it was then.",
            stacklevel=3,
        )


def note_quantization(model: nn.Module, adapter_name: str, config: PacaConfig) -> None:
    """Record in `config` how the adapted weights are quantized, and let the columns start from original values;
    `ValueError` if these are not the model's, or no adapted layer is quantized."""
    found = layers_of(model, adapter_name)
    layers = {name: m for name, m in found.items() if isinstance(m, OverlaidLinear) and m.quantization_name}
    if config.reading:
        warn_of_another(adapter_name, config, quantizations(layers.values()))
    else:
        config.base_quantization = quantizations(layers.values())
    if config.original_weights is None:
        return
    if config.reading:  # a file may not send us anywhere
        raise ValueError(
            f"The adapter in {config.reading} comes with original_weights={shown(config.original_weights)}, but a "
            "saved adapter has its columns. Set it to null in its config."
        )
    if not layers:
        raise ValueError(
            "original_weights is for quantized models: none of the adapted layers is quantized, so their columns are "
            "the original ones already. Leave it out."
        )
    of_base = config.original_weights == config.base_model_name_or_path
    originals = OriginalWeights(config.original_weights, config.revision if of_base else None)
    for name, layer in layers.items():
        shape, indices = (layer.out_features, layer.in_features), layer.paca_indices[adapter_name]
        was = getattr(layer.base_layer, "source_cls", nn.Linear)  # transformers notes what it quantized
        try:
            columns = originals.columns(name, indices, shape, stored_transposed=issubclass(was, Conv1D))
            layer.start_from(adapter_name, columns)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

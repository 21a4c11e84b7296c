"""A rotated adapter on its way to a file and from one, where it is a plain adapter with the union of its columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from paca.columns.column_union import ColumnUnion, split, trained_of, union_of
from paca.columns.state import Folded
from paca.config import PacaConfig
from paca.layers import PacaLayer
from paca.layers.base import FOLDED_DELTA, FOLDED_INDICES
from paca.tuner.adapter_checks import DELTA, INDICES
from paca.tuner.rotation.union_config import UnionLayer, union_settings


def with_unions(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], chosen: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put the union of the columns in the place of those trained now, and note in ``config`` what its file has to say.

    Args:
        model: holds the layers of the adapter.
        config: of the adapter.
        adapter_name: which one it is.
        state_dict: of the model, by whichever process and device it was gathered; holds the folded columns.
        chosen: the adapter's entries of it.
    """
    result, layers = dict(chosen), {}
    for key, layer in _layers_of(model, adapter_name).items():
        delta_name, indices_name = f"{key}.{DELTA}.{adapter_name}", f"{key}.{INDICES}.{adapter_name}"
        if delta_name not in chosen:  # of a state dict that somebody made
            continue
        indices, delta = chosen[indices_name], chosen[delta_name]
        folded = None
        for name in (FOLDED_DELTA, FOLDED_INDICES):
            result.pop(f"{key}.{name}.{adapter_name}", None)
        if f"{key}.{FOLDED_DELTA}.{adapter_name}" in state_dict:
            folded = Folded(
                state_dict[f"{key}.{FOLDED_INDICES}.{adapter_name}"].cpu(),
                state_dict[f"{key}.{FOLDED_DELTA}.{adapter_name}"].cpu(),
            )
        if folded is not None:
            union = union_of(indices, delta, folded, layer.delta_column_dim)
            result[indices_name], result[delta_name] = union.indices, union.delta
        scale = layer.paca_alpha[adapter_name] / layer.r[adapter_name]
        layers[_base_name(key)] = (UnionLayer(result[indices_name].numel(), scale), folded is not None)
    if isinstance(config, PacaConfig):
        rotated = any(has_folded for _, has_folded in layers.values())
        config.union = union_settings({name: layer for name, (layer, _) in layers.items()}) if rotated else None
    return result


def without_unions(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide each union among the loaded ``tensors`` into columns to train, as many as the layer trains, and the rest.

    A layer goes on training what it trains now, as far as the union has these columns.
    """
    result = dict(tensors)
    for key, layer in _layers_of(model, adapter_name).items():
        delta_name, indices_name = f"{key}.{DELTA}.{adapter_name}", f"{key}.{INDICES}.{adapter_name}"
        if delta_name not in tensors or tensors[indices_name].numel() <= layer.r[adapter_name]:
            continue
        union = ColumnUnion(tensors[indices_name].cpu(), tensors[delta_name].cpu())
        trained = trained_of(union.indices, layer.paca_indices[adapter_name].cpu())
        delta, folded = split(union, trained, layer.delta_column_dim)
        assert folded is not None
        result[delta_name], result[indices_name] = delta, trained
        result[f"{key}.{FOLDED_DELTA}.{adapter_name}"] = folded.delta
        result[f"{key}.{FOLDED_INDICES}.{adapter_name}"] = folded.indices
    return result


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta
    }


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")

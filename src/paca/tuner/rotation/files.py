"""A rotated adapter on its way to a file and from one, where it is a plain adapter with the union of its columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from paca.columns.folded import FOLDED_DELTA, FOLDED_INDICES, ColumnUnion, Folded, split, trained_of, union_of
from paca.config import PacaConfig
from paca.layers import layers_of
from paca.tuner.adapter_checks import DELTA, INDICES
from paca.tuner.rotation.union_config import UnionLayer, union_settings


def with_unions(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], chosen: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put the union of the columns in the place of those trained now, and note in `config` what its file has to say.

    `chosen` are the adapter's entries of the model's `state_dict`, which holds the folded columns, by whichever process
    and device it was gathered.
    """
    result, unions, rotated = dict(chosen), {}, False
    for key, layer in layers_of(model, adapter_name).items():
        delta, indices, folded_delta, folded_indices = _names(key, adapter_name)
        if delta not in chosen:  # of a state dict that somebody made
            continue
        result.pop(folded_delta, None), result.pop(folded_indices, None)
        folded = None if indices in state_dict else layer.folded.get(adapter_name)  # of parameters alone
        if folded_delta in state_dict:
            folded = Folded(state_dict[folded_indices].cpu(), state_dict[folded_delta].cpu())
        if folded is not None:
            rotated = True
            union = union_of(chosen[indices], chosen[delta], folded, layer.delta_column_dim)
            result[indices], result[delta] = union
        scale = layer.paca_alpha[adapter_name] / layer.r[adapter_name]
        unions[key.removeprefix("base_model.model.")] = UnionLayer(result[indices].numel(), scale)
    if isinstance(config, PacaConfig):
        config.union = union_settings(unions) if rotated else None
    return result


def without_unions(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Divide each union among the loaded `tensors` into columns to train, as many as the layer trains, and the rest.

    A layer goes on training what it trains now, as far as the union has these columns.
    """
    result = dict(tensors)
    for key, layer in layers_of(model, adapter_name).items():
        delta, indices, folded_delta, folded_indices = _names(key, adapter_name)
        if delta not in tensors or tensors[indices].numel() <= layer.r[adapter_name]:
            continue
        union = ColumnUnion(tensors[indices].cpu(), tensors[delta].cpu())
        result[indices] = trained_of(union.indices, layer.paca_indices[adapter_name].cpu())
        result[delta], folded = split(union, result[indices], layer.delta_column_dim)
        assert folded is not None
        result[folded_indices], result[folded_delta] = folded.indices, folded.delta
    return result


def _names(key: str, adapter_name: str) -> list[str]:
    """Of a layer's delta and indices, and of the folded ones, in a state dict."""
    return [f"{key}.{kind}.{adapter_name}" for kind in (DELTA, INDICES, FOLDED_DELTA, FOLDED_INDICES)]

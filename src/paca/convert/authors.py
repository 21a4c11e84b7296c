"""Checkpoints of the original authors' PaCA (github.com/WooSunghyeon/paca, read at commit 20570b3).

Their trainable `paca_w (out_features, r)` is the columns themselves over the scale: the adapted weight is
`W[:, paca_indices] = s * paca_w` with `s = paca_alpha / r` (`paca_update` in their layer.py), where ours
keeps the difference to the pretrained columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.selection import column_problem
from paca.convert.adapter import FILE_PREFIX
from paca.convert.foreign import ForeignAdapter, ForeignLayer, take_pairs
from paca.messages.errors import PacaError
from paca.tuner.adapter_checks import INDICES

COLUMNS = "paca_w"


def read_authors(config: dict[str, Any], tensors: dict[str, Tensor], base_model: nn.Module) -> ForeignAdapter:
    """Read such a checkpoint as differences to the columns of `base_model`.

    `delta = (s * paca_w - W0[:, paca_indices]) / s` is formed in float64 and rounded once to float32.

    Args:
        config: Their `adapter_config.json`.
        tensors: Of their file, by name.
        base_model: With its weights, in the dtype they were stored in.

    Raises:
        PacaError: A tensor that is missing, or does not fit the model; it is named.
    """
    # Theirs has fewer columns than r where a layer has fewer inputs, and scales by r all the same.
    scale = _positive_number(config, "paca_alpha") / _positive_number(config, "r")
    pairs, others = take_pairs(tensors, COLUMNS, INDICES)
    layers: dict[str, ForeignLayer] = {}
    largest = 0.0
    for name, (columns, indices) in pairs.items():
        weight = _weight(base_model, name)
        _check(name, columns, indices, weight)
        pretrained = weight.detach()[:, indices].double()
        trained = columns.double() * scale
        delta = ((trained - pretrained) / scale).float()
        largest = max(largest, float((trained - pretrained).norm() / pretrained.norm().clamp_min(1e-30)))
        layers[name] = ForeignLayer(delta, indices, scale)
    return ForeignAdapter("the original authors' PaCA", layers, others, largest)


def _positive_number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PacaError(f"The checkpoint's config must give {key} as a positive number; it gives {value!r}.")
    return value


def _weight(base_model: nn.Module, name: str) -> Tensor:
    try:
        module = base_model.get_submodule(name)
    except AttributeError as error:
        raise PacaError(f"The checkpoint adapts {name}, but the base model has no such module.") from error
    if not isinstance(module, nn.Linear):
        raise PacaError(f"The checkpoint adapts {name}, which is a {type(module).__name__}; Linear was expected.")
    return module.weight


def _check(name: str, columns: Tensor, indices: Tensor, weight: Tensor) -> None:
    """Refuse what would be read past the weight, or made into something of another shape by broadcasting."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise PacaError(f"{FILE_PREFIX}{name}.{INDICES} must be a list of whole numbers, (r,).")
    problem = column_problem(indices, weight.shape[1])
    if problem:
        raise PacaError(f"{FILE_PREFIX}{name}.{INDICES}: {problem}.")
    expected = (weight.shape[0], indices.numel())
    if tuple(columns.shape) != expected:
        raise PacaError(
            f"{FILE_PREFIX}{name}.{COLUMNS} has shape {tuple(columns.shape)}; for this base model it must have "
            f"{expected} (out_features, r)."
        )

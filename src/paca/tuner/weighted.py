"""Weighted sums of adapters, as one adapter: exact, since a sum of columns is columns.

A LoRA's product of two matrices has to be approximated or grown to be summed. PaCA's columns add up: the sum has the
union of the columns, and each of them the weighted sum of the adapters' changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from paca.columns.state import AdapterColumns
from paca.config import PacaConfig
from paca.layers import PacaLayer, refuse_sharded

EXACT = ("cat", "linear")
"""PEFT's names for sums; for PaCA both are the same."""


class WeightedSum(NamedTuple):
    """Columns that change a weight as much as others do together, with a scale of 1."""

    delta: Tensor
    """`(out_features, r)`, for a convolution `(out_channels, r, *kernel)`; r is the number of different columns."""
    indices: Tensor
    """`(r,)` int64, ascending."""


def weighted_sum(
    columns: Sequence[AdapterColumns], weights: Sequence[float], dtype: torch.dtype, column_dim: int = 1
) -> WeightedSum:
    """The union of `columns`, with `delta = sum_i weights[i] * scale_i * delta_i` (columns along `column_dim`).

    Taken in float64 (float32 on devices without it) and rounded once to `dtype`. So where no two adapters share a
    column, and `weights[i] * scale_i` is a power of two, no value is rounded at all.
    """
    device = columns[0].delta.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    union = torch.cat([c.indices.to(device) for c in columns]).unique(sorted=True)
    shape = list(columns[0].delta.shape)
    shape[column_dim] = union.numel()
    total = torch.zeros(shape, dtype=wide, device=device)
    for c, weight in zip(columns, weights, strict=True):
        places = torch.searchsorted(union, c.indices.to(device))
        total.index_add_(column_dim, places, c.delta.detach().to(device=device, dtype=wide), alpha=weight * c.scale)
    return WeightedSum(total.to(dtype), union)


@torch.no_grad()
def add_weighted_adapter(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """What `PacaModel.add_weighted_adapter` does."""
    holders = _check(model, adapters, weights, adapter_name, combination_type)
    refuse_sharded((m for m in model.model.modules() if isinstance(m, PacaLayer)), "add_weighted_adapter")
    sums: dict[str, WeightedSum] = {}
    for name, layer in model.model.named_modules():
        if isinstance(layer, PacaLayer):
            present = [
                (columns, w)
                for a, w in zip(adapters, weights, strict=True)
                if a in layer.paca_delta
                for columns in layer.all_columns_of(a)
            ]
            if present:
                dtype = torch.promote_types(layer.weight_placement()[1], torch.float32)
                sums[name] = weighted_sum(
                    [c for c, _ in present], [w for _, w in present], dtype, layer.delta_column_dim
                )

    model.peft_config[adapter_name] = _config(model, adapters[0], sums, sorted(holders))
    model.inject_adapter(model.model, adapter_name)
    for name, layer in model.model.named_modules():
        if name in sums:
            assert isinstance(layer, PacaLayer)
            layer.paca_delta[adapter_name].copy_(sums[name].delta)
            layer.paca_indices[adapter_name].copy_(sums[name].indices)
        elif name in holders:
            assert isinstance(layer, ModulesToSaveWrapper)
            whole = layer.modules_to_save
            whole[adapter_name].load_state_dict(whole[holders[name]].state_dict())


def _check(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> dict[str, str]:
    """Raise `ValueError` for what can't be summed; return which module (by name) which adapter trained whole."""
    if combination_type not in EXACT:
        raise ValueError(
            f"combination_type={combination_type!r} is not there for PaCA, whose columns can be summed exactly: use "
            f"{' or '.join(map(repr, EXACT))}, which both do that."
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already. Choose another name, or delete it first.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"add_weighted_adapter needs one weight per adapter; got {len(adapters)} adapters and {len(weights)} "
            "weights."
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter not in model.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; loaded are {', '.join(model.peft_config)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"The weight of adapter {adapter!r} must be a finite number; got {weight!r}.")
    holders: dict[str, str] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in module.modules_to_save]
            if len(own) > 1 or any(weight != 1 for _, weight in own):
                raise ValueError(
                    f"{name} is trained whole (modules_to_save) by {', '.join(a for a, _ in own)}, and there is no "
                    "weighted sum of whole modules. At most one of the adapters may have it, with weight 1."
                )
            if own:
                holders[name] = own[0][0]
    return holders


def _config(model: BaseTuner, first: str, sums: dict[str, WeightedSum], modules_to_save: list[str]) -> PacaConfig:
    """The settings of the sum: PEFT's format, from which any PEFT can load it; every layer's scale is 1."""
    ranks = {name: sum_.indices.numel() for name, sum_ in sums.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config: Any = model.peft_config[first]
    summed: PacaConfig = dataclasses.replace(
        config,
        r=r,
        paca_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(model.model, set(sums)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        selection="random",  # another might want calibration data; the columns are put in afterwards
        indices=None,
        rotate_every=None,
        init_weights=True,
        modules_to_save=modules_to_save or None,
    )
    return summed


def _targets(model: nn.Module, names: set[str]) -> set[str] | str:
    """Names that select exactly these layers: PEFT takes a module whose name *ends* in a given one as well."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in sorted(names))
    return names

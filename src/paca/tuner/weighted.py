"""Weighted sums of adapters, as one adapter: exact, since a sum of columns is columns.

A LoRA's product of two matrices has to be approximated or grown to be summed. PaCA's columns add up: the sum has the
union of the columns, and each of them the weighted sum of the adapters' changes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from paca.columns.folded import ColumnUnion
from paca.columns.kept import Kept, positions_of, sum_of
from paca.columns.scores import widest
from paca.columns.state import AdapterColumns
from paca.config import PacaConfig
from paca.layers import PacaLayer, paca_layers
from paca.layers.peft_calls import refuse_sharded
from paca.tuner.pruned_sums import PRUNED, Signs, check_pruning, pruned_sum
from paca.tuner.rotation.union_config import UnionLayer, union_settings

EXACT = ("cat", "linear")
"""PEFT's names for sums; for PaCA both are the same."""


def weighted_sum(
    columns: Sequence[AdapterColumns], weights: Sequence[float], dtype: torch.dtype, column_dim: int = 1
) -> ColumnUnion:
    """The union of `columns`, with `delta = sum_i weights[i] * scale_i * delta_i` (columns along `column_dim`) to be
    scaled by 1.

    Taken in float64 (float32 on devices without it) and rounded once to `dtype`. So where no two adapters share a
    column, and `weights[i] * scale_i` is a power of two, no value is rounded at all.
    """
    device = columns[0].delta.device
    weighted = tuple(c._replace(scale=weight * c.scale) for c, weight in zip(columns, weights, strict=True))
    union = positions_of(weighted, device)
    shape = list(columns[0].delta.shape)
    shape[column_dim] = union.numel()
    nothing = Kept(union, torch.zeros(shape, dtype=widest(device), device=device))
    return ColumnUnion(union, sum_of(nothing, weighted, column_dim).to(dtype))


class SumsAdapters(BaseTuner):
    """Mixin for `PacaModel`."""

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        *,
        density: float | None = None,
        majority_sign_method: Signs = "total",
    ) -> None:
        """Add the weighted sum of adapters as a new adapter, which is exact: it has the union of their columns.

        With the sum active, the weights are what `W0 + sum_i weights[i] * scale_i * delta_i` rounds to, once the
        deltas' sums are rounded to float32; columns of one adapter only, with `weights[i] * scale_i` a power of two,
        need no such rounding. The new adapter is not active.

        Args:
            adapters: Names of loaded adapters, whose ranks, columns and layers may differ.
            weights: One per adapter; negative ones subtract.
            adapter_name: Of the sum.
            combination_type: `"cat"` or `"linear"`, PEFT's names for sums: both are the same here. Or, for a sum of
                what is left of each adapter: `"ties"`, `"dare_ties"`, `"dare_linear"` or `"magnitude_prune"`.
            density: For these, the share of each adapter's values in a layer that is kept, above 0 and up to 1.
            majority_sign_method: For the two with ties, whose sign counts: `"total"` or `"frequency"`.

        Raises:
            ValueError: For an unknown adapter, a name that is taken, weights that are no finite numbers, another kind
                of combination or density, or a module that several of the adapters trained whole.
        """
        holders = _check(self, adapters, weights, adapter_name, combination_type)
        if combination_type in PRUNED:
            check_pruning(combination_type, density, majority_sign_method)
        refuse_sharded(paca_layers(self.model), "add_weighted_adapter")
        modules: dict[str, Any] = dict(self.model.named_modules())
        sums: dict[str, ColumnUnion] = {}
        for name, layer in modules.items():
            if isinstance(layer, PacaLayer):
                of_layer = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.paca_delta]
                present = [(layer.columns_of(a).parts(), w) for a, w in of_layer]
                if not present:
                    continue
                dtype = torch.promote_types(layer.base_layer.weight_placement()[1], torch.float32)
                dim = layer.delta_column_dim
                if density is not None and combination_type in PRUNED:
                    wide = widest(present[0][0][0].delta.device)
                    changes = [weighted_sum(parts, [1.0] * len(parts), wide, dim) for parts, _ in present]
                    own = [weight for _, weight in present]
                    total = pruned_sum(changes, own, combination_type, density, majority_sign_method, dim)
                    sums[name] = total._replace(delta=total.delta.to(dtype))
                else:
                    columns, factors = zip(*((part, w) for parts, w in present for part in parts), strict=True)
                    sums[name] = weighted_sum(columns, factors, dtype, dim)
        self.peft_config[adapter_name] = _config(self, adapters[0], sums, sorted(holders))
        self.inject_adapter(self.model, adapter_name)
        for name, sum_ in sums.items():
            modules[name].paca_delta[adapter_name].copy_(sum_.delta)
            modules[name].paca_indices[adapter_name].copy_(sum_.indices)
        for name, holder in holders.items():
            whole = modules[name].modules_to_save
            whole[adapter_name].load_state_dict(whole[holder].state_dict())


def _check(
    model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> dict[str, str]:
    """Raise `ValueError` for what can't be summed; return which module (by name) which adapter trained whole."""
    if combination_type not in (*EXACT, *PRUNED):
        raise ValueError(
            f"combination_type={combination_type!r} is not there for PaCA, whose columns can be summed exactly: use "
            f"{' or '.join(map(repr, EXACT))}, which both do that, or {', '.join(map(repr, PRUNED))}."
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
        if isinstance(module, TrainableTokensWrapper) and not module._adapters.isdisjoint(adapters):
            raise ValueError(
                f"Tokens of {name} are trained one by one (trainable_token_indices), and there is no weighted sum of "
                "their rows. Merge the adapters one after the other, or train without."
            )
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


def _config(model: BaseTuner, first: str, sums: dict[str, ColumnUnion], modules_to_save: list[str]) -> PacaConfig:
    """The settings of the sum: PEFT's format, from which any PEFT can load it; every layer's scale is 1."""
    sizes = {name: UnionLayer(sum_.indices.numel(), 1.0) for name, sum_ in sums.items()}
    config: Any = model.peft_config[first]
    summed: PacaConfig = dataclasses.replace(
        config,
        **union_settings(sizes),
        target_modules=_targets(model.model, set(sums)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
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

"""Names and numbers of blocks in a config that match none of the adapter's layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from paca.config import PacaConfig
from paca.layers import layers_of


def check_indices_used(model: nn.Module, adapter_name: str, named: Iterable[str]) -> None:
    """Raise `ValueError` if columns were `named` for a layer that the adapter does not have."""
    layers = list(layers_of(model, adapter_name))
    for unused in _unused(named, layers):
        others = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        raise ValueError(
            f"indices names columns for {unused!r}, but the adapter has no such layer; it has {', '.join(layers[:3])}"
            f"{others}. Correct the name, or add the layer to target_modules or target_parameters."
        )


def warn_of_unused(model: nn.Module, adapter_name: str, config: PacaConfig) -> None:
    """Warn of patterns without a layer, which PEFT does itself where there are no stacks of experts, and of blocks."""
    layers = list(layers_of(model, adapter_name))
    patterns = {**config.rank_pattern, **config.alpha_pattern} if config.target_parameters else {}
    if unused := _unused(patterns, layers):
        warnings.warn(f"rank_pattern or alpha_pattern: no adapted layer is called {unused}.", stacklevel=3)
    numbers = config.layers_to_transform
    wanted = [numbers] if isinstance(numbers, int) else numbers or ()
    found = {int(part) for name in layers for part in name.split(".") if part.isdecimal()}
    if missing := [number for number in wanted if number not in found]:
        there = ", ".join(map(str, sorted(found)))
        warnings.warn(
            f"layers_to_transform names blocks of which no layer is adapted: {', '.join(map(str, missing))}. There are "
            f"adapted layers in {there} (blocks are counted from 0).",
            stacklevel=3,
        )


def _unused(patterns: Iterable[str], layers: list[str]) -> list[str]:
    return [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers)]

"""Names in a config that match none of the adapter's layers."""

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
    """Warn of patterns without a layer; PEFT does it itself where there are no stacks of experts."""
    unused = _unused({**config.rank_pattern, **config.alpha_pattern}, list(layers_of(model, adapter_name)))
    if unused:
        warnings.warn(f"rank_pattern or alpha_pattern: no adapted layer is called {unused}.", stacklevel=3)


def _unused(patterns: Iterable[str], layers: list[str]) -> list[str]:
    return [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers)]

"""The settings of a rotated adapter as its file needs them: as if it had trained all its columns from the start."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import inf, nextafter
from typing import Any, NamedTuple, TypeVar

Number = TypeVar("Number", int, float)


class UnionLayer(NamedTuple):
    """One layer of a rotated adapter."""

    r: int
    """How many columns it trained in all."""
    scale: float
    """The factor on its delta, `paca_alpha / r` of the settings it was trained with."""


def union_settings(layers: Mapping[str, UnionLayer]) -> dict[str, Any]:
    """Fields of `PacaConfig`, by which an adapter with all these columns is the same. `layers`, not empty, have their
    names in the base model."""
    r, rank_pattern = default_and_pattern({name: layer.r for name, layer in layers.items()})
    alpha, alpha_pattern = default_and_pattern({n: alpha_for(layer.scale, layer.r) for n, layer in layers.items()})
    return {
        "r": r,
        "paca_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "indices": None,  # the file's own; those that the adapter began with are fewer
        "selection": "random",  # another might want batches, or those indices
    }


def default_and_pattern(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The commonest of the modules' values, and a `rank_pattern` or `alpha_pattern` of the modules with another."""
    default = Counter(values.values()).most_common(1)[0][0]
    # PEFT matches a pattern as the ending of a name; anchored, it is the whole name.
    return default, {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def alpha_for(scale: float, r: int) -> float:
    """The `paca_alpha` for which `paca_alpha / r` is `scale`, exactly if there is one."""
    alpha = scale * r
    nearby = (alpha, nextafter(alpha, -inf), nextafter(alpha, inf))
    return next((candidate for candidate in nearby if candidate / r == scale), alpha)

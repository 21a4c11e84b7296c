"""The columns that a config selects in one layer of a model, when the adapter is put in."""

from __future__ import annotations

import re
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from paca.columns.scores import explicit_columns, select_columns
from paca.columns.selection import AT_RANDOM, random_columns
from paca.config import PacaConfig
from paca.tuner.column_norms import scores_of
from paca.tuner.same_on_all_ranks import drawn_seed


def choose_columns(config: PacaConfig, layer: Any, in_features: int, key: str) -> Tensor:
    """The columns `(r,)` that `config` selects in `layer` (adapted or not yet), which the model calls `key`."""
    if (by_hand := given_columns(config, in_features, key)) is not None:
        return by_hand
    r = for_layer(key, config.rank_pattern, config.r)
    if config.selection in AT_RANDOM:
        if config.random_seed is None and not config.reading:
            config.random_seed = drawn_seed()  # kept: the saved adapter says what its columns follow from
        return random_columns(in_features, r, config.random_seed, key, config.selection)
    if config.reading:  # the file brings its columns along
        return random_columns(in_features, r, config.random_seed, key)
    return select_columns(config.selection, r, scores_of(layer, key, config.selection), key)


def given_columns(config: PacaConfig, in_features: int, key: str) -> Tensor | None:
    """The columns that `config.indices` lists for a layer, checked, or None."""
    given = for_layer(key, config.indices or {}, None)
    return None if given is None else explicit_columns(given, in_features, key)


def for_layer(key: str, patterns: dict[str, Any], default: Any) -> Any:
    """What `patterns`, of a config, give the layer that the model calls `key`."""
    whole = f"^{re.escape(key)}"  # as rotation lists layers; paca.select gives their names: no patterns to try
    found = key if key in patterns else whole if whole in patterns else get_pattern_key(list(patterns), key)
    return patterns.get(found, default)

"""The columns that a config selects in one layer of a model, when the adapter is put in."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.utils.other import get_pattern_key
from torch import Tensor, distributed

from paca.columns.selection import (
    AT_RANDOM,
    FROM_BATCHES,
    explicit_columns,
    random_columns,
    select_columns,
    weight_norms,
)
from paca.config import PacaConfig
from paca.layers import RESIDENT_CLASSES, PacaLayer
from paca.layers.overlaid import OverlaidLinear
from paca.quantized import quantization_of
from paca.tuner.rotation.same_on_all_ranks import same_on_all_ranks


def choose_columns(config: PacaConfig, layer: Any, in_features: int, key: str) -> Tensor:
    """The columns `(r,)` that `config` selects in `layer`.

    Args:
        config: The adapter's.
        layer: The module to adapt, or an adapted one; its weight is read for `"weight_norm"`.
        in_features: How many columns it has.
        key: What the model calls it.

    Raises:
        ValueError: If they can't be chosen, naming the layer.
    """
    by_hand = given_columns(config, in_features, key)
    if by_hand is not None:
        return by_hand
    r = rank_of(config, key)
    if config.selection in AT_RANDOM:
        if config.random_seed is None and not config.loading:
            config.random_seed = _drawn_seed()  # kept: the saved adapter says what its columns follow from
        return random_columns(in_features, r, config.random_seed, key, config.selection)
    if config.loading:  # the file brings its columns along
        return random_columns(in_features, r, config.random_seed, key)
    if config.selection in FROM_BATCHES:
        raise ValueError(
            f"{key}: selection={config.selection!r} chooses columns by what batches of data show, and config.indices "
            "has none for this layer. Call config = paca.select(model, config, batches) first, then put the adapter in "
            "with that config."
        )
    scores = column_norms(layer, key)
    return select_columns(config.selection, r, in_features=in_features, scores=scores, module_name=key)


def _drawn_seed() -> int:
    """A seed from torch's random state, the same in all processes of a run; all have to call this at the same time."""
    connected = distributed.is_available() and distributed.is_initialized()
    if not connected and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            "random_seed is null, so a seed has to be drawn, but the processes of this run are not connected yet and "
            "would draw different ones. Give random_seed a number, or connect them (accelerate.PartialState(), "
            "torch.distributed.init_process_group) before you make the adapter."
        )
    return int(same_on_all_ranks({"random_seed": torch.randint(2**31, (1,), device="cpu")})["random_seed"])


def rank_of(config: PacaConfig, key: str) -> int:
    """How many columns `config` wants in the layer that the model calls `key`."""
    if key in config.rank_pattern:
        return config.rank_pattern[key]
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)


def given_columns(config: PacaConfig, in_features: int, key: str) -> Tensor | None:
    """The columns that `config.indices` lists for a layer, checked, or None.

    Raises:
        ValueError: If they are no columns of the layer.
    """
    if not config.indices:
        return None
    given = config.indices.get(key)  # paca.select lists every layer by its full name: no patterns to try
    if given is None:
        given = config.indices.get(get_pattern_key(list(config.indices), key))
    return None if given is None else explicit_columns(given, in_features, key)


@torch.no_grad()
def column_norms(layer: Any, key: str) -> Tensor:
    """The norms `(in_features,)` of the columns of a layer's pretrained weight.

    Args:
        layer: A module that PaCA adapts, or has adapted; its columns are parked then.
        key: What the model calls it, for messages.

    Raises:
        ValueError: If the weight can't be read.
    """
    if isinstance(layer, OverlaidLinear):
        module: Any = layer.base_layer
    elif isinstance(layer, PacaLayer):
        module = layer.base_layer
        layer.park()
        return weight_norms(module.weight, module.input_dim)
    else:
        module = layer
    quantization = quantization_of(module)
    if quantization is not None:
        with align_module_device(module):
            if not isinstance(layer, OverlaidLinear):
                quantization.adopt(module)
            try:
                return weight_norms(quantization.dequantize(module), 1)
            finally:
                if not isinstance(layer, OverlaidLinear):
                    quantization.release(module)
    stock = getattr(module, "stock_class", type(module))
    resident_class = RESIDENT_CLASSES.get(stock)
    with align_module_device(module):  # accelerate lends an offloaded weight
        weight = getattr(module, "weight", None)
        if resident_class is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"{key}: selection='weight_norm' reads the weight, but a {stock.__module__}.{stock.__qualname__} can't "
                "give its own as floats. Use 'activation_norm' or 'activation_variance', which don't need it."
            )
        if weight.is_meta:
            raise ValueError(
                f"{key}: selection='weight_norm' reads the weight, which is not there (it is on the meta device). Load "
                "the weights first, or call paca.select on a loaded model and use the config that it returns."
            )
        return weight_norms(weight, resident_class.input_dim)

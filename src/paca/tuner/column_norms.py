"""The norms of a layer's columns, for `selection="weight_norm"`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from paca.columns.scores import weight_norms
from paca.columns.selection import FROM_BATCHES
from paca.layers import PacaLayer, resident_class
from paca.quantized import quantization_of


@torch.no_grad()
def scores_of(layer: Any, key: str, selection: str) -> Tensor:
    """What a selection that is not at random ranks the columns by, if the weight alone shows it: the norms
    `(in_features,)` of the columns of a layer's pretrained weight; an adapted layer is parked. Raise `ValueError` if
    batches have to show it, or the weight can't be read."""
    if selection in FROM_BATCHES:
        raise ValueError(
            f"{key}: selection={selection!r} chooses columns by what batches of data show, and config.indices has none "
            "for this layer. Call config = paca.select(model, config, batches) first, then put the adapter in with "
            "that config."
        )
    module: Any = layer
    if isinstance(layer, PacaLayer):
        layer.park()
        module = layer.base_layer
    quantization = quantization_of(module)
    if quantization is not None:
        with align_module_device(module):
            if module is layer:
                quantization.adopt(module)
            try:
                return weight_norms(quantization.dequantize(module), 1)
            finally:
                if module is layer:
                    quantization.release(module)
    stock = getattr(module, "stock_class", type(module))
    resident = resident_class(stock)
    with align_module_device(module):  # accelerate lends an offloaded weight
        weight = getattr(module, "weight", None)
        if resident is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"{key}: selection='weight_norm' reads the weight, but a {stock.__module__}.{stock.__qualname__} can't "
                "give its own as floats. Use 'activation_norm' or 'activation_variance', which don't need it."
            )
        if weight.is_meta:
            raise ValueError(
                f"{key}: selection='weight_norm' reads the weight, which is not there (it is on the meta device). Load "
                "the weights first, or call paca.select on a loaded model and use the config that it returns."
            )
        return weight_norms(weight, resident.input_dim)

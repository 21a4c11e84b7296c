"""Layers of PEFT that look at values, for plans, which have none: SHiRA's places, VB-LoRA's check of its logits,
WaveFT's choice of the places that lie inside its matrix, which is all of them, AdaMSS's clusters of rows, and how far
CPT's tokens have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import AdamssConfig, PeftConfig, WaveFTConfig
from peft.tuners.adamss import layer as adamss_layer
from peft.tuners.cpt import CPTEmbedding
from peft.tuners.shira.layer import Linear as ShiraLinear
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.vblora.layer import Linear as VBLoraLinear
from peft.tuners.waveft.layer import WaveFTLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_VBLORA_FACTORS = VBLoraLinear._get_lora_matrices
_WAVEFT_DELTA = WaveFTLayer.get_delta_weight


@contextmanager
def nothing_drawn(adapter: PeftConfig) -> Iterator[None]:
    """Within it, layers of `adapter` are made on weights without values.

    WaveFT does not draw its places among all of each weight's, which takes seconds for a large one. AdaMSS's clusters
    are of equal size, and of full rank.
    """
    with ExitStack() as stack:
        if isinstance(adapter, WaveFTConfig):
            stack.enter_context(patch.object(torch, "randperm", _unseen_order))
        elif isinstance(adapter, AdamssConfig):
            stack.enter_context(patch.object(adamss_layer, "slice_pca", _unseen_factors))
            stack.enter_context(patch.object(adamss_layer, "clustering_Z", _even_clusters))
            stack.enter_context(patch.object(adapter, "use_dynamic_rank", False))
        yield


def _unseen_order(count: int, **options: Any) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def _unseen_factors(weight: Tensor, r: int, *_: Any, **options: Any) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape[-2:]
    rank = min(r, rows, columns)
    return weight.new_empty(1, 1, rank, columns), weight.new_empty(1, 1, rows, rank)


def _even_clusters(rows: Tensor, count: int, rounds: int) -> tuple[Tensor, int]:
    count = min(count, len(rows))
    return torch.arange(len(rows)) % count, count


def give_places(model: nn.Module) -> None:
    """SHiRA's layers chose no weights, without a mask: give them as many places as they train weights."""
    for layer in (module for module in model.modules() if isinstance(module, ShiraLayer)):
        for name, values in layer.shira_weight.items():
            if name not in layer.shira_indices:
                layer.shira_indices[name] = torch.empty(2, values.numel(), dtype=torch.int32, device=values.device)


def places(model: nn.Module) -> Iterator[Tensor]:
    """What the layers hold besides parameters and buffers."""
    return (indices for layer, name in _with_places(model) for indices in getattr(layer, name).values())


def fake_places(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    """Turn what `places` gives into fake tensors, in place."""
    for layer, name in _with_places(model):
        setattr(layer, name, {adapter: fake(indices) for adapter, indices in getattr(layer, name).items()})


@contextmanager
def not_looked_at() -> Iterator[None]:
    """Within it, layers of the four methods run on tensors without values."""
    with (
        patch.object(VBLoraLinear, "_get_lora_matrices", _vblora_factors),
        patch.object(WaveFTLayer, "get_delta_weight", _waveft_delta),
        patch.object(ShiraLinear, "get_delta_weight", lambda layer, adapter: _SparseDelta(layer, adapter)),
        patch.object(CPTEmbedding, "get_projection", lambda encoder: encoder.delta_embedding.weight.data),
    ):
        yield


def _with_places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The layers, and the name of what they hold."""
    for module in model.modules():
        if isinstance(module, ShiraLayer | WaveFTLayer):
            yield module, "shira_indices" if isinstance(module, ShiraLayer) else "waveft_indices"


def _vblora_factors(layer: Any, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
    """PEFT's, with logits that are not infinite: it asks while training."""
    training, layer.training = layer.training, False
    try:
        factors: tuple[Tensor, Tensor] = _VBLORA_FACTORS(layer, adapter, cast_to_fp32)
        return factors
    finally:
        layer.training = training


def _waveft_delta(layer: Any, adapter: str) -> Tensor:
    with _MasksLetAllThrough():
        return _WAVEFT_DELTA(layer, adapter)


class _MasksLetAllThrough(TorchFunctionMode):
    """Indexing by a vector of booleans gives everything, by its positions, as torch does it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            tensor, key = args
            args = (tensor, tuple(map(_positions, key)) if isinstance(key, tuple) else _positions(key))
        return func(*args, **(kwargs or {}))


def _positions(key: Any) -> Any:
    if not isinstance(key, Tensor) or key.dtype != torch.bool:
        return key
    return torch.empty(key.numel(), dtype=torch.int64, device=key.device)


class _SparseDelta:
    """SHiRA's delta: a sparse matrix, which is added to a copy of the weight. Tensors without values are never sparse.

    What is allocated is the same but for a copy of the values: the places as 64-bit integers, and in the backward pass
    the weight's gradient, of which the places are taken.
    """

    def __init__(self, layer: Any, adapter: str) -> None:
        self.places = layer.shira_indices[adapter].to(torch.int64)
        self.values = layer.shira_weight[adapter] * layer.scaling[adapter]

    def __radd__(self, weight: Tensor) -> Tensor:
        rows, columns = self.places
        return weight.index_put_((rows, columns), self.values.to(weight.dtype), accumulate=True)

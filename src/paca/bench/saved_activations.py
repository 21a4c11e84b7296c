"""What a forward pass leaves in the autograd graph: the bytes that stay allocated until the backward has used them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class SavedActivations(NamedTuple):
    """What a graph holds, each storage counted once, largest first."""

    tensors: tuple[Tensor, ...]
    """Of each storage the largest tensor saved from it, which may be a view of a part."""

    @property
    def bytes(self) -> int:
        """Of the whole storages: a small view keeps all of one alive."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)


class _Held:
    """What the graph keeps in place of a saved tensor, so that its lifetime can be watched."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # a saved output still has its node, which would hold itself alive


def measure_saved_activations(forward: Callable[[], Any], module: nn.Module) -> SavedActivations:
    """Run `forward` once with gradients enabled and measure what the graph of its result holds.

    Counted are the tensors that autograd saves (`save_for_backward` of custom functions included) and still holds when
    `forward` has returned: unique storages, whole storages, without the parameters and buffers of `module`. Tensors
    that a custom function keeps as attributes of its context, and tensors packed by hooks inside `forward`, are not
    seen.

    Raises:
        ValueError: The result of `forward` has no graph, so nothing was measured.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        entry = _Held(tensor)
        held.add(entry)
        return entry

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        result = forward()
    if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
        raise ValueError(
            "no tensor in the result of forward() requires grad, so the graph holds nothing: make a parameter or the "
            "input embedding's output require grad, and return the output or the loss"
        )
    own = {tensor.untyped_storage()._cdata for tensor in chain(module.parameters(), module.buffers())}
    found: dict[int, Tensor] = {}
    saved = chain.from_iterable(_dense_parts(entry.tensor) for entry in held)
    for tensor in sorted(saved, key=Tensor.numel):  # of one storage the largest stays
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage.nbytes():
            found[storage._cdata] = tensor
    return SavedActivations(tuple(sorted(found.values(), key=lambda tensor: -tensor.untyped_storage().nbytes())))


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor._indices(), tensor._values()) if tensor.layout is torch.sparse_coo else (tensor,)

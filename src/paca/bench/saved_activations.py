"""What a forward pass leaves in the autograd graph: the bytes that stay allocated until the backward has used them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn


class SavedStorage(NamedTuple):
    """One storage that the graph holds, described by the largest tensor saved from it."""

    shape: tuple[int, ...]
    """Shape of that tensor; it may be a view of part of the storage."""
    dtype: torch.dtype
    bytes: int
    """Size of the whole storage: a small view keeps all of it alive."""


class SavedActivations(NamedTuple):
    """The storages held by a graph, each counted once, largest first."""

    storages: tuple[SavedStorage, ...]

    @property
    def bytes(self) -> int:
        """Sum over the storages, in bytes."""
        return sum(storage.bytes for storage in self.storages)


class _Held:
    """What the graph keeps in place of a saved tensor, so that its lifetime can be watched."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def measure_saved_activations(forward: Callable[[], Any], module: nn.Module) -> SavedActivations:
    """Run `forward` once with gradients enabled and measure what the graph of its result holds.

    Counted are the tensors that autograd saves (`save_for_backward` of custom functions included) and still holds when
    `forward` has returned: unique storages, whole storages, without the parameters and buffers of `module`. Tensors
    that a custom function keeps as attributes of its context, and tensors packed by hooks inside `forward`, are not
    seen.

    Args:
        forward: Runs the model and returns anything that keeps the graph alive (the output or the loss).
        module: The model, whose parameters and buffers are left out of the count.

    Raises:
        ValueError: The result of `forward` has no graph, so nothing was measured.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Held:
        entry = _Held(tensor.detach())  # a saved output still has its node, which would hold itself alive
        held.add(entry)
        return entry

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor):
        result = forward()
    if not any(tensor.requires_grad for tensor in _tensors(result)):
        raise ValueError(
            "no tensor in the result of forward() requires grad, so the graph holds nothing: make a parameter or the "
            "input embedding's output require grad, and return the output or the loss"
        )
    own = {_storage_key(tensor) for tensor in chain(module.parameters(), module.buffers())}
    found: dict[int, SavedStorage] = {}
    for entry in held:
        tensor = entry.tensor
        key = _storage_key(tensor)
        if key in own or tensor.untyped_storage().nbytes() == 0:
            continue
        storage = SavedStorage(tuple(tensor.shape), tensor.dtype, tensor.untyped_storage().nbytes())
        known = found.get(key)
        if known is None or tensor.numel() > torch.Size(known.shape).numel():
            found[key] = storage
    return SavedActivations(tuple(sorted(found.values(), key=lambda storage: -storage.bytes)))


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]

"""What an adapted model must hold and compute, in plain float64: no code of paca's is used here.

It keeps the pretrained weights and every adapter's values, forms `W0 + sum scale * scatter(delta)`, runs the stock
model with it, and lets autograd do the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from operation_sequences.subjects import Subject, logits_of

Gradients = dict[tuple[str, str], Tensor]
"""By layer and adapter."""


@dataclass
class Columns:
    """One adapter in one layer."""

    indices: Tensor  # (r,)
    delta: Tensor  # as the adapter's file has it, in its dtype
    scale: float
    folded: dict[int, Tensor] = field(default_factory=dict)  # column to values, of those trained before

    def copy(self) -> Columns:
        return Columns(self.indices.clone(), self.delta.clone(), self.scale, dict(self.folded))

    def union(self, dim: int) -> dict[int, Tensor]:
        """All columns that were ever trained, with their values."""
        return self.folded | dict(zip(self.indices.tolist(), self.delta.clone().unbind(dim), strict=True))


Adapter = dict[str, Columns]
"""By layer."""


class Expected:
    """The state that a model must be in."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.dtype = torch.float64
        self.stock: nn.Module = subject.stock().requires_grad_(False)  # in float64 always, with values of `dtype`
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.disabled = False
        self.merged: dict[str, Adapter] = {}  # with the values they had then

    def weight_name(self, layer: str) -> str:
        """The stock model's name for the weight of a layer; a stack of experts is a parameter itself."""
        return layer if layer in dict(self.stock.named_parameters()) else f"{layer}.weight"

    def original(self, layer: str) -> Tensor:
        """The pretrained weight, in the model's dtype."""
        return self.stock.get_parameter(self.weight_name(layer)).to(self.dtype)

    def held(self) -> dict[str, Adapter]:
        """What the weights hold now."""
        held = {name: dict(adapter) for name, adapter in self.merged.items()}
        for name, adapter in self.trained().items():
            held[name] = {**adapter, **held.get(name, {})}
        return held

    def trained(self) -> dict[str, Adapter]:
        """What of the active adapters is in the weights as columns that get gradients: not in layers where something
        is merged. (Disabling unmerges; who merges after that has it in the weight.)"""
        merged = {layer for adapter in self.merged.values() for layer in adapter}
        active = [] if self.disabled else self.active
        return {n: {layer: c for layer, c in self.adapters[n].items() if layer not in merged} for n in active}

    def layers(self) -> set[str]:
        """All that any adapter has."""
        return {layer for adapter in (*self.adapters.values(), *self.merged.values()) for layer in adapter}

    def cast(self, dtype: torch.dtype) -> None:
        """As `model.to(dtype)`: all values are rounded."""
        self.dtype = dtype
        for parameter in self.stock.parameters():
            parameter.data = parameter.data.to(dtype).double()
        for buffer in self.stock.buffers():
            buffer.data = buffer.data.to(dtype).double() if buffer.is_floating_point() else buffer.data
        for adapter in self.adapters.values():
            for columns in adapter.values():
                columns.delta = columns.delta.to(dtype)

    # -- the formula ---------------------------------------------------------------------------------------------------

    def weight(self, layer: str, held: Mapping[str, Adapter], leaves: Mapping[Any, Tensor] | None = None) -> Tensor:
        """`W0 + sum scale * scatter(delta)`, float64, not rounded. Deltas are taken from `leaves` if they are there."""
        dim, total = self.subject.column_dim, self.original(layer).double()
        for name, adapter in held.items():
            if layer not in adapter:
                continue
            columns = adapter[layer]
            for column, values in columns.folded.items():
                index = [slice(None)] * total.dim()
                index[dim] = column
                total = total.clone()
                total[tuple(index)] += columns.scale * values.double()
            delta = (leaves or {}).get((layer, name), columns.delta).double()
            oriented = delta if self.subject.delta_dim == dim else delta.mT
            total = total.index_add(dim, columns.indices, columns.scale * oriented)
        return total

    def run(self, x: Tensor, held: Mapping[str, Adapter], leaves: Mapping[Any, Tensor] | None = None) -> Tensor:
        """The logits of the stock model whose weights hold `held`, each rounded to the model's dtype."""
        weights = {}
        for layer in {layer for adapter in held.values() for layer in adapter}:
            total = self.weight(layer, held, leaves)
            rounding = total.detach().to(self.dtype).double() - total.detach()
            weights[self.weight_name(layer)] = total + rounding
        return logits_of(functional_call(self.stock, weights, (x,)))

    def _leaves(self, held: Mapping[str, Adapter], trainable: Iterable[tuple[str, str]]) -> dict[Any, Tensor]:
        wanted = set(trainable)
        return {
            (layer, name): columns.delta.detach().double().requires_grad_()
            for name, adapter in held.items()
            for layer, columns in adapter.items()
            if (layer, name) in wanted
        }

    def forward(self, x: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """The logits. With `names`, of each sample with its own adapter (`__base__` for none)."""
        with torch.no_grad():
            return self._forward(x, names, {})

    def _forward(self, x: Tensor, names: Sequence[str] | None, leaves: Mapping[Any, Tensor]) -> Tensor:
        if names is None:
            return self.run(x, self.held(), leaves)
        rows = []
        for row, name in enumerate(names):
            held = {} if name == "__base__" or self.disabled else {name: self.adapters[name]}
            rows.append(self.run(x[row : row + 1], held, leaves))
        return torch.cat(rows)

    def forward_backward(
        self, x: Tensor, trainable: Iterable[tuple[str, str]], names: Sequence[str] | None = None
    ) -> tuple[Tensor, Gradients]:
        """The logits, and the gradients of `loss_of` them for the deltas that are `trainable`."""
        held = self.trained() if names is None else {n: self.adapters[n] for n in set(names) & self.adapters.keys()}
        leaves = self._leaves(held, trainable)
        with torch.enable_grad():
            logits = self._forward(x, names, leaves)
            found: Any = ()
            if leaves and logits.requires_grad:
                found = torch.autograd.grad(loss_of(logits), list(leaves.values()), allow_unused=True)
        gradients = {key: grad for key, grad in zip(leaves, found, strict=False) if grad is not None}
        return logits.detach(), gradients

    def generate(self, x: Tensor, count: int) -> Tensor:
        """Greedy decoding that may not end, the whole text anew for each token."""
        end = self.stock.config.eos_token_id  # type: ignore[union-attr]
        for _ in range(count):
            logits = self.forward(x)[:, -1]
            if end is not None:
                logits[:, end] = -torch.inf
            x = torch.cat([x, logits.argmax(-1, keepdim=True)], 1)
        return x

    # -- changes -------------------------------------------------------------------------------------------------------

    def merge(self, names: Sequence[str]) -> None:
        for name in names:
            self.merged.setdefault(name, {layer: c.copy() for layer, c in self.adapters[name].items()})

    def rotate(self, name: str, indices: Mapping[str, Tensor]) -> None:
        """Train the columns `indices` of each layer from now on; all values stay."""
        dim = self.subject.delta_dim
        for layer, columns in self.adapters[name].items():
            union = columns.union(dim)
            zero = torch.zeros_like(columns.delta.select(dim, 0))
            new = [union.pop(column, zero).to(zero.dtype) for column in indices[layer].tolist()]
            columns.indices, columns.delta, columns.folded = indices[layer].clone(), torch.stack(new, dim), union

    def copy(self) -> Expected:
        return copy.deepcopy(self)


def loss_of(logits: Tensor) -> Tensor:
    """A loss that is flat in no column."""
    return logits.square().sum() / 8

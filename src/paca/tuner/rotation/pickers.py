"""Which columns a rotation picks: a function from a layer to `r` of its columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from paca.columns.scores import weight_norms
from paca.columns.selection import column_generator, shuffled
from paca.layers import PacaLayer


class RotatingLayer(NamedTuple):
    """What a picker is told."""

    name: str
    """Of the layer, in the base model."""
    layer: PacaLayer
    """Its weight, `layer.base_layer.weight`, holds all that was trained so far."""
    adapter_name: str
    number: int
    """Which rotation this is, counted from 1."""
    seed: int | None
    """`random_seed` of the adapter; None where it was loaded from a file that has none."""

    @property
    def r(self) -> int:
        """How many columns to pick."""
        return self.layer.r[self.adapter_name]

    @property
    def turns(self) -> Tensor:
        """`(in_features,)` int64 on the CPU: 2 for columns trained now, 1 for those trained before, else 0."""
        turns = torch.zeros(self.layer.in_features, dtype=torch.int64)
        folded = self.layer.folded.get(self.adapter_name)
        if folded is not None:
            turns[folded.indices] = 1
        turns[self.layer.paca_indices[self.adapter_name].cpu()] = 2
        return turns

    def first_of(self, order: Tensor) -> Tensor:
        """The first `r` columns of `order (in_features,)`, new ones before those that had their turn."""
        return order[self.turns[order].sort(stable=True).indices][: self.r]


Picker = Callable[[RotatingLayer], Tensor]
"""Gives `(r,)` different column numbers, in any order."""


def _at_random(strategy: str, rotating: RotatingLayer) -> Tensor:
    """Columns drawn from (random_seed, module name, rotation number) alone."""
    generator = column_generator(rotating.seed, f"{rotating.name}:rotation {rotating.number}")
    return rotating.first_of(shuffled(strategy, rotating.layer.in_features, generator))


def _by_weight_norm(rotating: RotatingLayer) -> Tensor:
    """The columns with the largest norms in the weight as it is now."""
    base = rotating.layer.base_layer
    norms = weight_norms(base.weight, base.input_dim).cpu()
    return rotating.first_of(norms.sort(descending=True, stable=True).indices)


PICKERS: dict[str, Picker] = {
    "random": partial(_at_random, "random"),
    "random_blocks": partial(_at_random, "random_blocks"),
    "weight_norm": _by_weight_norm,
}


def picker_of(pick: str | Picker) -> Picker:
    """The picker of that name, or `pick` itself; `ValueError` if there is none."""
    if not isinstance(pick, str) and callable(pick):
        return pick
    if pick not in PICKERS:
        raise ValueError(f"pick={pick!r} is unknown; choose one of {', '.join(PICKERS)}, or give a function.")
    return PICKERS[pick]

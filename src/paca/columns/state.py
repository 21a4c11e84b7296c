"""The trained columns of an adapter in one layer, and the state of a weight that holds some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paca.functional.column_blocks import runs_of


@dataclass(frozen=True, eq=False)
class Folded:
    """Columns that an adapter trained before others took their turn (``paca.rotate``): on the CPU, never changed.

    They go on being part of the adapter, with its scale, and of the weight that holds the adapter.
    """

    indices: Tensor
    """``(k,)`` int64, sorted and unique, none of them among those that are trained now."""
    delta: Tensor
    """As the adapter's delta, with ``k`` columns."""


class Columns(NamedTuple):
    """The trained columns of one adapter in one layer."""

    name: str
    """The adapter's name, for messages."""
    delta: Tensor
    """``(out_features, r)``."""
    indices: Tensor
    """``(r,)`` int64, sorted and unique."""
    scale: float
    """``paca_alpha / r``, times whatever the user scaled the adapter by."""
    folded: Folded | None = None
    """Those that the adapter trained before."""
    source: Tensor | None = None
    """If ``delta`` is but this process's rows of it: what has the gradient, and a version counter that shows writes."""

    @property
    def parameter(self) -> Tensor:
        """What is trained: ``delta`` itself, or what it is a part of."""
        return self.delta if self.source is None else self.source

    def same_as(self, other: Columns) -> bool:
        """Whether both are the same tensors with the same scale (values are a matter of version counters)."""
        return (
            self.delta is other.delta
            and self.indices is other.indices
            and self.scale == other.scale
            and self.folded is other.folded
        )


def version_of(tensor: Tensor) -> int:
    """The tensor's version counter; inference tensors have none and cannot be trained, so they count as unchanged."""
    return -1 if tensor.is_inference() else tensor._version


class State:
    """What a weight holds: some adapters' columns as they were at one moment. Without columns: the pretrained weight.

    ``tag`` names the content: it is equal for two states that hold the same values, which is how a forward pass that
    activation checkpointing repeats is recognised as the same one.
    """

    __slots__ = (
        "columns",
        "deltas",
        "generation",
        "hidden_writes",
        "indices",
        "runs",
        "scales",
        "tag",
        "tag_tensor",
        "versions",
        "watched",
    )

    def __init__(self, columns: tuple[Columns, ...], generation: int, hidden_writes: int = 0) -> None:
        self.columns = columns
        self.deltas = tuple(c.delta for c in columns)
        self.indices = tuple(c.indices for c in columns)
        self.runs = tuple(runs_of(i) for i in self.indices)
        self.scales = tuple(c.scale for c in columns)
        self.generation = generation
        self.hidden_writes = hidden_writes
        versions, watched, content = [], [], []
        # One pass: a state is made per layer and optimizer step.
        for _, delta, indices, scale, folded, source in columns:
            trained = delta if source is None else source
            versions.append(((version_of(trained), version_of(delta)), version_of(indices)))
            tensors = (delta, indices) if source is None else (delta, indices, source)
            watched += [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
            content.append((id(delta), id(indices), scale, id(folded)))
        self.versions = tuple(versions)
        self.watched = tuple(watched)
        """Every delta and indices that has a version counter, with its version: flat, since it is compared often."""
        self.tag = hash((tuple(content), self.versions, generation, hidden_writes if columns else 0))
        self.tag_tensor = torch.tensor(self.tag, dtype=torch.int64, device="cpu")
        if self.tag_tensor.is_inference():  # autograd saves it, also if the first forward pass was inference
            with torch.inference_mode(False):
                self.tag_tensor = self.tag_tensor.clone()

    def unchanged(self) -> bool:
        """Whether every delta still has the values it had, as far as version counters tell."""
        for tensor, version in self.watched:  # noqa: SIM110  (a generator would cost more than the comparison)
            if tensor._version != version:
                return False
        return True

    def holds(self, wanted: tuple[Columns, ...]) -> bool:
        """Whether this state is what ``wanted`` would give now."""
        if wanted is self.columns:
            return self.unchanged()
        return (
            len(wanted) == len(self.columns)
            and all(mine.same_as(theirs) for mine, theirs in zip(self.columns, wanted, strict=True))
            and self.unchanged()
        )

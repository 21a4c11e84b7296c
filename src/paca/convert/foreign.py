"""What the readers of other formats hand over: columns and scales by layer, and what is left of the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from paca.convert.adapter import FILE_PREFIX
from paca.messages.errors import PacaError


class ForeignLayer(NamedTuple):
    """The adapted weight is ``W0[:, indices] + alpha / r * delta`` there."""

    delta: Tensor  # (out_features, r)
    indices: Tensor  # (r,)
    alpha: float


@dataclass
class ForeignAdapter:
    """An adapter of another tool, not yet checked against its base model."""

    kind: str
    """What it is, in words."""

    layers: dict[str, ForeignLayer]
    """By the module's name in the base model."""

    others: dict[str, Tensor]
    """The tensors of its file that belong to no adapted layer, by their names there."""

    largest_move: float | None = None
    """How far the columns of a layer moved at most, as a share of their size; None where they were not looked at."""


def take_pairs(
    tensors: dict[str, Tensor], first: str, second: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Sort out the tensors ``<layer>.<first>`` and ``<layer>.<second>``.

    Returns:
        The pairs by layer, and all other tensors.

    Raises:
        PacaError: one of a pair is missing.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for kind in (first, second):
            if name.endswith(f".{kind}"):
                halves.setdefault(name.removeprefix(FILE_PREFIX).removesuffix(f".{kind}"), {})[kind] = tensor
                break
        else:
            others[name] = tensor
    for layer, found in halves.items():
        for kind in (first, second):
            if kind not in found:
                raise PacaError(f"The checkpoint has no {FILE_PREFIX}{layer}.{kind}: it is incomplete.")
    return {layer: (found[first], found[second]) for layer, found in halves.items()}, others


def positive_number(config: dict[str, Any], key: str) -> float:
    """The value of ``key``.

    Raises:
        PacaError: it is missing or not a positive number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PacaError(f"The checkpoint's config must give {key} as a positive number; it gives {value!r}.")
    return value

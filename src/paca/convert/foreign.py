"""What the readers of other formats hand over: columns and scales by layer, and what is left of the file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from paca.convert.adapter import FILE_PREFIX
from paca.messages.errors import PacaError


class ForeignLayer(NamedTuple):
    """The adapted weight is `W0[:, indices] + scale * delta` there."""

    delta: Tensor  # (out_features, r)
    indices: Tensor  # (r,)
    scale: float


class ForeignAdapter(NamedTuple):
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
    """Sort out the tensors `<layer>.<first>` and `<layer>.<second>`.

    Returns:
        The pairs by layer, and all other tensors.

    Raises:
        PacaError: One of a pair is missing.
    """
    paired = [name for name in tensors if name.endswith((f".{first}", f".{second}"))]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in paired:
        layer = name.removesuffix(f".{first}").removesuffix(f".{second}")
        for missing in {f"{layer}.{first}", f"{layer}.{second}"} - tensors.keys():
            raise PacaError(f"The checkpoint has no {missing}: it is incomplete.")
        pairs[layer.removeprefix(FILE_PREFIX)] = (tensors[f"{layer}.{first}"], tensors[f"{layer}.{second}"])
    return pairs, {name: tensor for name, tensor in tensors.items() if name not in paired}

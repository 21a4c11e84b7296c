"""Weights that a language model's checkpoint lacks, which transformers would make at random."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from paca.messages.errors import PacaError


def check_nothing_missing(model: nn.Module, missing: Iterable[str], name: str) -> None:
    """Raise `PacaError` where `missing`, as transformers tells it, names parameters of the language model `name`."""
    parameters = {parameter for parameter, _ in model.named_parameters()}
    if lacking := sorted(parameters.intersection(missing)):
        listed = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4:,} more" if len(lacking) > 4 else "")
        raise PacaError(
            f"The checkpoint {name!r} lacks weights of {type(model).__name__}, which would be made at random: "
            f"{listed}. Is it of another kind, such as a classifier? Give a language model's checkpoint."
        )

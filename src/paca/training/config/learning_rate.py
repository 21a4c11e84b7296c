"""`train.learning_rate: auto`: the rate of a run that gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.config import PacaConfig
from paca.pretrained.learning_rate import rate_and_rule
from paca.training.trainers.kind import TrainerKind

AUTO = "auto"
_FAR = 20
"""Times as high or as low as the automatic rate: more than PaCA's was off from any best rate that was found."""


def follows_weights(kind: TrainerKind, method: str, factor_rank: int | None = None) -> bool:
    """Whether the rate depends on the model's weights."""
    return method == "paca" and kind.rate_of_weights is not None and factor_rank is None


def automatic_rate(
    kind: TrainerKind,
    method: str,
    adapter: Mapping[str, Any],
    weight_size: float | None = None,
    factor_rank: int | None = None,
) -> tuple[float, str]:
    """The rate and, in words, where it is from.

    Args:
        kind: The run's trainer.
        method: The run's, such as `paca`.
        adapter: Settings of its section that the user gave.
        weight_size: The root mean square of the model's linear weights; None where that is not known.
        factor_rank: Of `train`; with it a rate is as large as LoRA's.
    """
    if method == "full":
        return kind.arguments.learning_rate, "the trainer's own default"
    if kind.rate_of_weights is None or not follows_weights(kind, method, factor_rank):
        return kind.learning_rate, "for adapters"
    return rate_and_rule(adapter.get("paca_alpha", PacaConfig.paca_alpha), weight_size, kind.rate_of_weights)


def beside_automatic(given: float, automatic: float, *, by_rule: bool) -> str:
    """What a user who gave a rate is told of the automatic one; one that follows no rule is no measure of theirs."""
    told = f"auto would be {automatic:g}"
    ratio = given / automatic if by_rule else 1.0
    if ratio > _FAR:
        return f"{told}: is it right? It is {ratio:,.0f} times as high"
    if 0 < ratio < 1 / _FAR:
        return f"{told}: is it right? It is {1 / ratio:,.0f} times as low"
    return told

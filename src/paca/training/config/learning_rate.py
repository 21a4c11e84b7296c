"""`train.learning_rate: auto`: the rate of a run that gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from paca.config import PacaConfig
from paca.pretrained.learning_rate import (
    RATES_OF_WEIGHTS,
    factors_rate_and_rule,
    is_plain_lora,
    lora_rate_and_rule,
    rate_and_rule,
)
from paca.training.trainers.kind import TrainerKind

AUTO = "auto"
_FAR = 20
"""Times as high or as low as the automatic rate: more than PaCA's was off from any best rate that was found."""


def follows_weights(method: str, adapter: Mapping[str, Any]) -> bool:
    """Whether the rate depends on the model's weights."""
    return method == "paca" or (method == "lora" and is_plain_lora(adapter))


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
        factor_rank: Of `train`; then PaCA's rate is that of LoRA with this r.
    """
    if method == "full":
        return kind.arguments.learning_rate, "the trainer's own default"
    if not follows_weights(method, adapter):
        return kind.learning_rate, "for adapters"
    of_columns, of_lora = RATES_OF_WEIGHTS[kind.name]
    if method == "lora":
        r, alpha = adapter.get("r", LoraConfig.r), adapter.get("lora_alpha", LoraConfig.lora_alpha)
        scaled = bool(adapter.get("use_rslora"))
        return lora_rate_and_rule(r, alpha, weight_size, of_lora, rslora=scaled)
    r, alpha = adapter.get("r", PacaConfig.r), adapter.get("paca_alpha", PacaConfig.paca_alpha)
    if factor_rank is not None:
        return factors_rate_and_rule(factor_rank, r, alpha, weight_size, of_lora)
    return rate_and_rule(alpha, weight_size, of_columns)


def of_adam(rule: str, optimizer: str | None) -> str:
    """A rule in words, with what it says of an optimizer that it was not made for."""
    if optimizer is None or "adam" in optimizer.lower():
        return rule
    return f"{rule}; AdamW's: {optimizer} may want another by far"


def far_off(given: float, automatic: float) -> str | None:
    """How far a user's rate is from the automatic one, such as "50 times as high"; None where it is near."""
    ratio = given / automatic
    if ratio > _FAR:
        return f"{_number(ratio)} times as high"
    return f"{_number(1 / ratio)} times as low" if 0 < ratio < 1 / _FAR else None


def _number(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.1e}"

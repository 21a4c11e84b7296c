"""`train.learning_rate: auto`: the rate of a run that gives none.

For PaCA it follows from `r`, by a rule that was fitted to measured runs. The width of the layers is not in it: an
output is a sum over the `r` trained columns, however many others there are, so one step of Adam moves it by the rate
times `r` in a narrow layer and in a wide one. docs/notes/learning-rate.md has the measurements, and where the rule was
not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.config import PacaConfig
from paca.training.trainers.kind import TrainerKind

AUTO = "auto"
_AT_ONE_COLUMN = 0.031
_FALLS_BY = 2 / 3


def automatic_rate(kind: TrainerKind, method: str, adapter: Mapping[str, Any]) -> tuple[float, str]:
    """The rate and, in words, where it is from.

    Args:
        kind: The run's trainer.
        method: The run's, such as `paca`.
        adapter: Settings of its section that the user gave.
    """
    if method == "full":
        return kind.arguments.learning_rate, "the trainer's own default"
    if method != "paca" or not kind.rate_follows_r:
        return kind.learning_rate, "for adapters"
    r, alpha = adapter.get("r", PacaConfig.r), adapter.get("paca_alpha", PacaConfig.paca_alpha)
    rule = f"{_AT_ONE_COLUMN:g} / r^(2/3)"
    if alpha != r:
        rule += " × r / paca_alpha"
    return float(f"{_AT_ONE_COLUMN / r**_FALLS_BY * r / alpha:.2g}"), rule

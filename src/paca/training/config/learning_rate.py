"""`train.learning_rate: auto`: the rate of a run that gives none.

For PaCA it follows from `r` and from the size of the weights, by a rule that was fitted to measured runs. Adam moves
each value by about the rate, however large it is: so a model with small weights needs a small one. The width of the
layers is not in it: an output is a sum over the `r` trained columns, however many others there are.
docs/notes/learning-rate.md has the measurements, and where the rule was not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.config import PacaConfig
from paca.training.trainers.kind import TrainerKind

AUTO = "auto"
_OF_WEIGHTS = 0.152  # the rate of one column, as a part of the weights' root mean square
_FALLS_BY = 2 / 3
_USUAL_SIZE = 0.03  # assumed where it can't be read; Gemma 3 270M has 0.037, SmolLM2-135M 0.2


def follows_weights(kind: TrainerKind, method: str) -> bool:
    """Whether the rate depends on the model's weights."""
    return method == "paca" and kind.rate_follows_r


def automatic_rate(
    kind: TrainerKind, method: str, adapter: Mapping[str, Any], weight_size: float | None = None
) -> tuple[float, str]:
    """The rate and, in words, where it is from.

    Args:
        kind: The run's trainer.
        method: The run's, such as `paca`.
        adapter: Settings of its section that the user gave.
        weight_size: The root mean square of the model's linear weights; None where that is not known.
    """
    if method == "full":
        return kind.arguments.learning_rate, "the trainer's own default"
    if not follows_weights(kind, method):
        return kind.learning_rate, "for adapters"
    r, alpha = adapter.get("r", PacaConfig.r), adapter.get("paca_alpha", PacaConfig.paca_alpha)
    size = weight_size or _USUAL_SIZE
    known = "the root mean square of the weights" if weight_size else "assumed of the weights, which can't be read yet"
    rule = f"{_OF_WEIGHTS:g} × {size:.2g} / r^(2/3)"
    if alpha != r:
        rule += " × r / paca_alpha"
    return float(f"{_OF_WEIGHTS * size / r**_FALLS_BY * r / alpha:.2g}"), f"{rule}; {size:.2g} is {known}"

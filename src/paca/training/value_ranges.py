"""Numbers of a run that can't work, refused by their range before anything heavy is imported.

Only what is surely a mistake: most of it torch or transformers would refuse too, minutes later, or take without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from paca.messages.errors import PacaError
from paca.training.key_checks import Origins


class _Range(NamedTuple):
    words: str
    """What a value must be."""
    low: float
    low_included: bool
    below: float = math.inf
    """The value must be less than this (so never infinite, nor NaN)."""

    def holds(self, value: float) -> bool:
        return (value > self.low or (self.low_included and value == self.low)) and value < self.below


_ABOVE_ZERO = _Range("above zero", 0, False)
_NOT_NEGATIVE = _Range("zero or more", 0, True)
_SHARE = _Range("zero or more and less than 1", 0, True, 1)

RANGES: dict[str, _Range] = {
    "paca.r": _ABOVE_ZERO,
    "paca.paca_alpha": _ABOVE_ZERO,
    "train.per_device_train_batch_size": _ABOVE_ZERO,
    "train.per_device_eval_batch_size": _ABOVE_ZERO,
    "train.gradient_accumulation_steps": _ABOVE_ZERO,
    "train.num_train_epochs": _ABOVE_ZERO,
    "train.max_length": _ABOVE_ZERO,
    "train.logging_steps": _ABOVE_ZERO,
    "train.save_steps": _ABOVE_ZERO,
    "train.eval_steps": _ABOVE_ZERO,
    "train.learning_rate": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.max_grad_norm": _NOT_NEGATIVE,
    "train.adam_epsilon": _NOT_NEGATIVE,
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.dataloader_num_workers": _NOT_NEGATIVE,
    "train.seed": _NOT_NEGATIVE,
    "train.data_seed": _NOT_NEGATIVE,
    "train.adam_beta1": _SHARE,
    "train.adam_beta2": _SHARE,
    "train.label_smoothing_factor": _SHARE,
}


def check_ranges(section: str, settings: Mapping[str, Any], origins: Origins) -> None:
    """Refuse the numbers of a section (``paca`` or ``train``) that can't work; their types are checked already.

    Raises:
        PacaError: Names the key, its place, and what it must be.
    """
    for name, value in settings.items():
        key = f"{section}.{name}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if key in RANGES and not RANGES[key].holds(value):
            raise PacaError(f"{origins.of(key)}: {key} must be {RANGES[key].words}, not {value}.")
        if key == "train.max_steps" and value < 1 and value != -1:
            raise PacaError(f"{origins.of(key)}: {key} must be 1 or more (or -1: as many as the epochs), not {value}.")

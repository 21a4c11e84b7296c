"""What TRL's trainers measure of held-out data, as means over its examples: theirs are over batches.

With several processes some examples count twice, as Accelerate repeats a few to fill the last batches.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.trainer_pt_utils import find_batch_size

_EXTREMES = ("min_reward", "max_reward")
"""Of a batch: their mean tells of batches."""


class WeighsBatches:
    """Goes before one of TRL's trainers among a class's bases.

    In its means a last batch of one example counts as much as the full ones, so that a share of examples would follow
    from the size of the batches.
    """

    _metrics: dict[str, dict[str, list[float]]]  # TRL's: for "eval" and each name, a value for each batch
    _sizes: tuple[int, ...] = ()
    """Of the held-out batches since the last log."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; where the model evaluates, the size of the batch is kept."""
        if not model.training:
            self._sizes = (*self._sizes, find_batch_size(inputs) or 0)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's, with one value for each metric that has one a batch: their mean, weighed by the examples."""
        sizes, self._sizes = self._sizes, ()
        for name, values in self._metrics["eval"].items() if sum(sizes) else ():
            if len(values) != len(sizes) or name in _EXTREMES:
                continue
            known = [(value, size) for value, size in zip(values, sizes, strict=True) if not math.isnan(value)]
            if known:  # GRPO leaves out batches that no reward function rates
                weights = sum(size for _, size in known)
                self._metrics["eval"][name] = [sum(value * size for value, size in known) / weights]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

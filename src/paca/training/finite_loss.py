"""Stops a run whose loss is no longer a number."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.errors import PacaError


class StopOnNonFiniteLoss(TrainerCallback):
    """Raises as soon as a logged training loss is NaN or infinite, before a checkpoint of that step is saved.

    Comes last among the callbacks, so that the step is still recorded.
    """

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Check the loss.

        Raises:
            PacaError: It is not finite.
        """
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise PacaError(
                f"The training loss is {loss} at step {state.global_step}, so the weights are of no use from here on. "
                f"Try a lower train.learning_rate (now {args.learning_rate:g}) or a longer train.warmup_steps; with "
                "fp16, try bf16 or float32."
            )

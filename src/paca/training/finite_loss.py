"""Stops a run whose loss, or what it trained, is no longer a number."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.errors import PacaError


class StopOnNonFiniteLoss(TrainerCallback):
    """Raises as soon as a logged training loss is NaN or infinite, before a checkpoint of that step is saved.

    What a step leaves no loss tells before the next one. So it is looked at where it is to be saved.

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
                + _advice(args)
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the weights if a checkpoint of them is due.

        Raises:
            PacaError: They are not finite.
        """
        if control.should_save:
            self.on_train_end(args, state, control, model=model)

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the weights. Of shards all processes ask at once.

        Raises:
            PacaError: They are not finite.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
                raise PacaError(
                    f"The weights are not finite after step {state.global_step}: {name} has NaN or infinite values. "
                    f"They are not saved. {_advice(args)}"
                )


def _advice(args: TrainingArguments) -> str:
    return (
        f"Try a lower train.learning_rate (now {args.learning_rate:g}) or a longer train.warmup_steps; with fp16, try "
        "bf16 or float32."
    )

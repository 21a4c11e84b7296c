"""`train.early_stopping_patience`: a run ends once its held-out data has not been fitted better for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.say import say


class StopEarly(TrainerCallback):
    """Ends a run after `patience` evaluations without a better one.

    What it goes by is the log in every checkpoint. transformers' `EarlyStoppingCallback` counts in itself: a resumed
    run begins at zero, or with `restore_callback_states_from_checkpoint` makes a step more if it had ended already.
    """

    def __init__(self, patience: int, console: Console) -> None:
        """Args:
        patience: How many evaluations.
        console: Where the end is told.
        """
        self.patience = patience
        self.console = console

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look at the newest evaluation; the one before training counts for nothing, as it does for the best model."""
        if since_best(state, args) < self.patience:
            return
        control.should_training_stop = True
        if state.is_world_process_zero and state.global_step < state.max_steps:
            say(
                self.console,
                f"Stopped early, after step {state.global_step:,} of {state.max_steps:,}: {args.metric_for_best_model} "
                f"on held-out data was no better in {self.patience:,} evaluations (train.early_stopping_patience).",
            )


def since_best(state: TrainerState, arguments: TrainingArguments) -> int:
    """How many evaluations there were after the best one, which is the first of those that are alike.

    Args:
        state: Of the trainer, with its log.
        arguments: Of the trainer, which say what is best.
    """
    name = f"eval_{str(arguments.metric_for_best_model or 'loss').removeprefix('eval_')}"
    found = [row[name] for row in state.log_history if row["step"] and name in row]
    if not found:
        return 0
    best = max(found) if arguments.greater_is_better else min(found)
    return len(found) - 1 - found.index(best)


def patience_warning(train: Mapping[str, Any], steps: int | None) -> str | None:
    """What is said of a patience that a run is too short for; None where it may end the run, or that is not known.

    Args:
        train: The section of a run's config, with defaults.
        steps: Of the run.
    """
    patience, each = train.get("early_stopping_patience"), train.get("eval_steps")
    if patience is None or steps is None or train.get("eval_strategy") != "steps" or not each:
        return None
    count = steps // (math.ceil(steps * each) if each < 1 else int(each))
    if patience + 1 < count:  # the first evaluation may be the best one
        return None
    return (
        f"train.early_stopping_patience is {patience}, which ends no run that is evaluated {count} times "
        f"(train.eval_steps {each:g} of {steps:,} steps). Evaluate more often, or wait for less."
    )

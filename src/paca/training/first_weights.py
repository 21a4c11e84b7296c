"""Whether a training still has the weights that it began with."""

from __future__ import annotations

from transformers import TrainerState, TrainingArguments


def unmoved(arguments: TrainingArguments, state: TrainerState) -> bool:
    """Whether no step has changed a weight yet: none was made, or the one whose rate is 0, with which a warm-up begins.

    Args:
        arguments: Of the trainer.
        state: Its steps so far.
    """
    return state.global_step <= int(arguments.get_warmup_steps(state.max_steps) > 0)

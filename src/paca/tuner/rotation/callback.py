"""Rotation in transformers' Trainer and whatever is made of it, by a callback."""

from __future__ import annotations

import os
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from paca.layers import paca_layers
from paca.tuner.rotation.pickers import Picker
from paca.tuner.rotation.rotate import rotate, rotating_adapter, set_trained_columns, sharded, trained_columns

_RECORD = "paca_trained_columns"


class RotateColumns(TrainerCallback):
    """Rotates the active adapter's columns every `rotate_every` steps (of its `PacaConfig`).

    At the beginning of a step, so that whatever a trainer does after a step (evaluate, save, stop) sees the adapter
    as that step left it. Which columns are trained is recorded in the trainer's state (`trainer_state.json`), from
    which a resumed run takes it.

    Args:
        pick: As for `paca.rotate`.
    """

    def __init__(self, pick: str | Picker | None = None) -> None:
        self.pick = pick
        self._every = self._rotated_at = 0

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the adapter can be rotated; raise a `ValueError` if not."""
        self._every = _every(args, kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the columns that a checkpoint names, if there is one; raise a `ValueError` if it names none."""
        model, records = kwargs["model"], cast("dict[str, Any]", state.stateful_callbacks)
        self._every, self._rotated_at = _every(args, model), 0
        if _RECORD in records:
            columns = {key: [int(column) for column in text.split()] for key, text in records[_RECORD].items()}
            set_trained_columns(model, columns)
        elif state.global_step and any(layer.folded for layer in paca_layers(model)):
            raise ValueError(
                "The checkpoint holds a rotated adapter, but its trainer_state.json does not say which of the columns "
                "were being trained, so the run can't be continued from it. Save checkpoints with RotateColumns among "
                "the trainer's callbacks."
            )
        _record(state, model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rotate, if it is time and this step did not yet."""
        step = state.global_step
        if not step or step % self._every or step == self._rotated_at:
            return
        rotate(kwargs["model"], kwargs["optimizer"], step // self._every, pick=self.pick)
        self._rotated_at = step
        _record(state, kwargs["model"])


def _record(state: TrainerState, model: Any) -> None:
    # As text: the file has a line for each number otherwise.
    columns = {key: " ".join(map(str, numbers)) for key, numbers in trained_columns(model).items()}
    cast("dict[str, Any]", state.stateful_callbacks)[_RECORD] = columns


def _every(args: TrainingArguments, model: Any) -> int:
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise sharded("this run is to be sharded by FSDP")
    name, config, _ = rotating_adapter(model)
    if config.rotate_every is None:
        raise ValueError(
            f"RotateColumns needs to know how often: set rotate_every in the PacaConfig of adapter {name!r}."
        )
    return config.rotate_every

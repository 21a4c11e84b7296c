"""Checkpoints of a run: each is whole before an older one goes, and while it is not it counts for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from paca.messages.disk import disk_error
from paca.messages.errors import PacaError
from paca.training.folder.checkpoint_names import own_names, refuse_missing_weights
from paca.training.folder.run_folder import RunFolder


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint when all of it is on the disk, and then removes the older ones.

    It comes last among the callbacks: what the others add to a checkpoint, or take from it, is part of it.
    """

    def __init__(self, folder: RunFolder, arguments: TrainingArguments) -> None:
        """Args:
        folder: Of the run.
        arguments: Of the trainer. It is not to remove checkpoints itself, so their `save_total_limit` is taken away.
        """
        self.folder = folder
        self.being_saved: Path | None = None
        """The checkpoint that the trainer is writing."""
        self._waits = False
        self._limit, arguments.save_total_limit = arguments.save_total_limit, None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the best checkpoint again: the trainer knows it by a path, and the folder may have been moved."""
        if state.best_global_step and (best := self.folder.checkpoint(state.best_global_step)).is_dir():
            state.best_model_checkpoint = str(best)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make ready for the checkpoint of this step, if there will be one.

        At the end of an epoch that is evaluated it waits for the evaluation, which draws a random number (torch's
        `DataLoader` does). A run that is resumed from before it would leave it out, and drop out other values.
        """
        self._waits = control.should_save and args.eval_strategy == "epoch" and state.epoch == round(state.epoch or 0)
        if self._waits:
            control.should_save = False
        self._make_ready(state, control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The same, for the checkpoint at the end of an epoch."""
        if self._waits:
            self._waits, control.should_save = False, True
        self._make_ready(state, control)

    def _make_ready(self, state: TrainerState, control: TrainerControl) -> None:
        if not control.should_save:
            return
        self.being_saved = self.folder.checkpoint(state.global_step)
        if state.is_world_process_zero:
            self.folder.check_there()
            self.folder.set_aside(state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once all processes have written their parts: mark it, and remove those that are too many."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            self.folder.mark_whole(state.global_step, to_resume=not args.save_only_model)
            best = state.best_model_checkpoint
            rotate_checkpoints(str(self.folder.checkpoints), self._limit, best_model_checkpoint=best)
        self.being_saved = None

    @contextmanager
    def explained(self, trainer: Any) -> Iterator[None]:
        """A block in which the trainer trains. The rest of a checkpoint that it could not write is removed.

        Raises:
            DiskError: It could not be written.
        """
        try:
            with own_names(trainer.model):
                yield
        except Exception as error:
            if self.being_saved is None or isinstance(error, PacaError):
                raise
            told = None
            if trainer.is_world_process_zero():
                left, needs = None, self.bytes_of(trainer.model, trainer.optimizer)
                with suppress(OSError):
                    needs = max(needs, size_on_disk(self.being_saved) + 1)
                    left = shutil.disk_usage(self.being_saved).free
                    self.folder.drop_what_was_cut_short()
                if (newest := self.folder.newest_checkpoint()) is not None:
                    needs = max(needs, size_on_disk(newest))
                told = disk_error(error, self.being_saved, needs, left)
            if told is None:
                raise
            raise told from error

    def bytes_of(self, model: nn.Module, optimizer: Any = None) -> int:
        """Bytes of what is trained and, with an optimizer, of a checkpoint, about."""
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        states = () if optimizer is None else optimizer.state.values()
        kept = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        return trained + sum(value.nbytes for value in kept)


def size_on_disk(folder: Path) -> int:
    """Bytes that a folder's files take there."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def kept_step(state: TrainerState, arguments: TrainingArguments) -> int:
    """The step whose weights are the result."""
    return state.best_global_step if arguments.load_best_model_at_end and state.best_global_step else state.global_step


def load_if_finished(
    trainer: Any, state: TrainerState, checkpoint: Path, folder: RunFolder, *, early: bool = False
) -> bool:
    """Load the weights of a run of which no step is left; else let the trainer go on from its checkpoint.

    Args:
        trainer: Of the run.
        state: Of the checkpoint.
        checkpoint: The newest one's folder.
        folder: Of the run. The result is the best checkpoint's weights, if the trainer is to load these.
        early: Whether the run ended with this checkpoint, before its last step.

    Returns:
        Whether every step is made, and only the results are missing. The trainer would make another step.

    Raises:
        PacaError: Its weights can't be read here.
    """
    refuse_missing_weights(trainer, checkpoint)
    if state.global_step < state.max_steps and not early:
        # What was given as a share of all steps is a number of steps in the state; the trainer would warn.
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if getattr(trainer.args, name) is not None:
                setattr(trainer.args, name, getattr(state, name))
        return False
    result = folder.checkpoint(kept_step(state, trainer.args))
    if not result.is_dir():
        raise PacaError(
            f"Every step of this run is made, and its best weights are those of {result}, which is not there. Put it "
            "back, or start anew."
        )
    if trainer.is_deepspeed_enabled or not any((*result.glob("adapter_model.*"), *result.glob("model*.safetensors"))):
        raise PacaError(
            f"Every step of this run is made, but {result} is one of shards or of DeepSpeed's, which only training "
            "can read. Move it away; --resume goes on from the checkpoint before it."
        )
    refuse_missing_weights(trainer, result)
    trainer._load_from_checkpoint(str(result))
    trainer.state = state
    return True

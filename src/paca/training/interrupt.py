"""Ctrl-C and SIGTERM while training: finish the step, save a checkpoint, stop. A second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the current step.

    Use as a context manager around the run and give it to the trainer as a callback. Outside the training loop
    (loading, evaluating, writing results) there is nothing to save, and a signal raises ``KeyboardInterrupt``.
    With several processes all of them stop at the same step, whichever got the signal.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        """Args:
        announce: Shows the user a line.
        """
        self.announce = announce
        self.stopped = False
        """Whether training ended because of a signal."""
        self._training = False
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on as SIGTERM, so only the same signal twice means "at once".
        if not self._training or number in self._received:
            raise KeyboardInterrupt
        if not self._received:
            self.announce("Stopping: a checkpoint is saved at the end of this step (Ctrl-C again stops at once) ...")
        self._received.add(number)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on (the evaluation before the first step is over) a signal is kept until the end of the step."""
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal came to any process."""
        if not self._any_process_received(args.device):
            return
        self.stopped = True
        control.should_save = True
        control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep strategies of ``epoch`` from acting in the middle of one.

        The trainer reports the end of an epoch also where it stops inside of it; an evaluation there would be one that
        the uninterrupted run never makes. At a true end it is made, and the checkpoint written anew, since it draws
        from the random generators that the checkpoint holds.
        """
        if not self.stopped:
            return
        inside = state.epoch is not None and state.epoch != round(state.epoch)
        if inside:
            control.should_log = control.should_evaluate = control.should_save = False
        elif control.should_evaluate:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal stops at once."""
        self._training = False

    def _any_process_received(self, device: torch.device) -> bool:
        received = bool(self._received)
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return received
        flag = torch.tensor([int(received)], device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())

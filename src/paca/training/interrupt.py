"""Ctrl-C and SIGTERM while training: finish the step, save a checkpoint, stop. A second one stops at once."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_STOPPING = "Stopping: a checkpoint is saved at the end of this step (Ctrl-C again stops at once) ..."
_UNWINDING_SECONDS = 3.0
"""For so long after a signal has stopped the run, further ones are taken for the same impatience and do nothing: they
would only cut off the clean-up. After that they count again, so that a clean-up that hangs can be stopped too."""


class StopOnSignal(TrainerCallback):
    """Turns the first signal into a checkpoint at the end of the current step.

    Use as a context manager around the run and give it to the trainer as a callback. Outside the training loop
    (loading, evaluating, writing results) there is nothing to save, and a signal raises `KeyboardInterrupt`.
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
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._announcer: threading.Thread | None = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._announcer = threading.Thread(target=self._announce_lines, name="paca-announcer", daemon=True)
            self._announcer.start()
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            _handling.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _handling.discard(self)
        if self._announcer is not None:
            self._lines.put(None)
            self._announcer.join(timeout=1)
        if isinstance(error, Exception) and self._interrupted_at is not None and _followed_interrupt(error):
            raise KeyboardInterrupt from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on as SIGTERM, so only the same signal twice means "at once".
        if not self._training or number in self._received:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at < _UNWINDING_SECONDS:
                return
            self._interrupted_at = now
            raise KeyboardInterrupt
        first = not self._received
        self._received.add(number)
        if first:
            # Not printed here: a handler runs between any two instructions, also in the middle of another print, whose
            # pending text would come out once more. A SimpleQueue is the one that a handler may put into.
            self._lines.put(_STOPPING)

    def _announce_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            self.announce(line)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on (the evaluation before the first step is over) a signal is kept until the end of the step."""
        self._training = True
        if self._interrupted_at is not None:  # see `_any_process_received`
            self._lines.put(_STOPPING)

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal came to any process."""
        if not self._any_process_received(args.device):
            return
        self.stopped = True
        control.should_save = True
        if args.save_strategy == SaveStrategy.BEST:  # or an evaluation at this step would take that back
            args.save_strategy = SaveStrategy.STEPS
        control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep strategies of `epoch` from acting in the middle of one.

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

    def raise_discarded(self) -> None:
        """Where nothing is trained any more: raise what was discarded (see `_any_process_received`)."""
        if self._interrupted_at is not None:
            raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on a signal stops at once."""
        self._training = False

    def _any_process_received(self, device: torch.device) -> bool:
        # Python discards what is raised in a finalizer, and the run went on: it stops after its first step.
        received = bool(self._received) or self._interrupted_at is not None
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return received
        flag = torch.tensor([int(received)], device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return bool(flag.item())


def _followed_interrupt(error: BaseException) -> bool:
    """Whether it was raised while a `KeyboardInterrupt` went up, as by datasets, which then asks its workers for what
    they have not done yet."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


_LOOK_SECONDS = 1.0
"""So often a process that was started in the place of another looks for signals that came as it began to wait."""

_handling: set[StopOnSignal] = set()
_forking = threading.local()


def _hold_signals() -> None:
    if _handling and threading.current_thread() is not threading.main_thread():  # whose handlers would raise in here
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release_signals() -> None:
    if (mask := _forking.__dict__.pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _leave_signals_to_parent() -> None:
    """In a process that tokenizes or loads data: the one that forked it hears of a Ctrl-C, and ends it by SIGTERM."""
    if not _handling:
        return
    _handling.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    if "mask" in _forking.__dict__:  # the pool may end it while it starts
        signal.signal(signal.SIGALRM, _look)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        _release_signals()
    except SystemExit:  # Python would discard it here
        os._exit(1)


def _leave(number: int, frame: FrameType | None) -> None:
    # Not by the signal's own action: a worker that waits for its task would take the lock of the pool along, for which
    # the pool waits as it ends.
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _look(number: int, frame: FrameType | None) -> None:
    # Of a signal between Python's last look for one and the system's wait for a lock that wait does not end, and only
    # after it Python calls the handler: that of another signal, which ends it, has nothing else to do.
    pass


if hasattr(os, "register_at_fork"):
    # Python forgets signals that reach a child before it has finished its fork, as that of a pool that ends while a
    # thread of it starts a worker, and waits for that worker. They are held until the child's own handlers are there.
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_signals_to_parent)

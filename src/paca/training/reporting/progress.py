"""What a run shows while it trains: one live line in a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.say import say
from paca.messages.units import format_bytes, format_duration
from paca.training.reporting.metrics import MetricsLog, RecordMetrics

_PLAIN_LINES = 20  # about so many lines for a whole run where the output is no terminal ...
_PLAIN_LONGEST_GAP = 50  # ... but never more steps than this between two of them
_PLAIN_EVALUATION_SECONDS = 60.0  # and a line so often while it evaluates


def busy(console: Console, message: str) -> AbstractContextManager[object]:
    """A block that takes a while, with a message: for as long as it runs in a terminal, else as a line of its own."""
    if console.is_terminal and not console.quiet:
        return console.status(message)
    say(console, message)  # in a log file, so that minutes without a line don't look like a standstill
    return nullcontext()


class ShowProgress(TrainerCallback):
    """Shows step, loss, tokens/s, peak memory and time left. Comes after `RecordMetrics` among the callbacks."""

    def __init__(
        self,
        console: Console,
        log: MetricsLog,
        recorder: RecordMetrics,
        counts: str = "tokens",
        score: str | None = None,
    ) -> None:
        """Args:
        console: Where it is shown.
        log: What `recorder` writes.
        recorder: Measures speed and memory.
        counts: What the speed is measured in.
        score: A metric of evaluations that is shown besides the loss.
        """
        self.counts = counts
        self.score = score
        self.console = console
        self.log = log
        self.recorder = recorder
        self._live: Live | None = None
        self._first_step = 0
        self._train_seconds_at_start = 0.0
        self._evaluated = 0
        self._evaluation_began = self._evaluation_seconds = 0.0
        self._evaluated_each: int | None = None
        self._next_plain_step = 0
        self._last_drawn = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the live line."""
        self._first_step = state.global_step
        self._train_seconds_at_start = self.recorder.train_seconds
        self._evaluated_each = int(state.eval_steps) if args.eval_strategy == "steps" and state.eval_steps else None
        if self.console.is_terminal:
            self._live = Live(
                Text("starting ..."), console=self.console, refresh_per_second=4, redirect_stderr=True, transient=True
            )
            self._live.start()
        elif args.eval_on_start:
            say(self.console, "Measuring the held-out loss before training ...")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move the live line on, also between two logs."""
        self._draw(state)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Bring the live line up to date, or print a plain one."""
        if "loss" not in (logs or {}):
            return
        self._draw(state)
        if self._live is None and (state.global_step >= self._next_plain_step or state.global_step == state.max_steps):
            say(self.console, self._line(state))
            gap = max(1, min(state.max_steps // _PLAIN_LINES, _PLAIN_LONGEST_GAP))
            self._next_plain_step = state.global_step + gap

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say how far an evaluation is."""
        self._evaluated += 1
        if self._evaluated == 1:
            self._evaluation_began = time.monotonic()
        if self._live is not None and time.monotonic() - self._last_drawn > 0.25:
            self._last_drawn = time.monotonic()
            self._draw(state, f"  (evaluating: batch {self._evaluated})")
        elif self._live is None:
            now = time.monotonic()
            if self._evaluated == 1:
                self._last_drawn = now
            elif now - self._last_drawn > _PLAIN_EVALUATION_SECONDS:
                self._last_drawn = now
                say(self.console, f"evaluating: batch {self._evaluated}")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Print the held-out loss; it stays above the live line."""
        if self._evaluated:
            self._evaluation_seconds = time.monotonic() - self._evaluation_began
        self._evaluated = 0
        loss = (metrics or {}).get("eval_loss")
        if loss is not None:
            value = None if self.score is None else self.log.eval_metric_at(state.global_step, self.score)
            besides = "" if value is None else f", {self.score} {value:.4f}"
            say(self.console, f"step {state.global_step}: held-out loss {loss:.4f}{besides}")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Close the live line and leave its last state behind."""
        if self._live is not None:
            self.close()
            say(self.console, self._line(state))

    def close(self) -> None:
        """Take the live line away; also called when training ends with an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, state: TrainerState, ending: str = "") -> None:
        if self._live is not None:
            self._live.update(Text(self._line(state) + ending, no_wrap=True, overflow="ellipsis"))

    def _line(self, state: TrainerState) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}"]
        row = self.log.last_training_row()
        if row is not None:
            loss = row["loss"]
            parts.append("loss not finite (NaN or infinite)" if loss is None else f"loss {loss:.4f}")
            parts.append(f"{row['tokens_per_second']:,.0f} {self.counts}/s")
            parts.append(f"peak {format_bytes(row['peak_memory_bytes'])}")
        done = state.global_step - self._first_step
        if done:
            per_step = (self.recorder.train_seconds - self._train_seconds_at_start) / done
            left = per_step * (state.max_steps - state.global_step)
            if (each := self._evaluated_each) is not None:  # as long as the last one took
                left += self._evaluation_seconds * (state.max_steps // each - state.global_step // each)
            parts.append(f"{format_duration(left)} left")
        return "  ".join(parts)

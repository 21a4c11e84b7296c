"""metrics.jsonl: one row for each logged step and each evaluation, without duplicates or holes across resumes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from paca.messages.disk import writing
from paca.pretrained.whole_output import write_whole
from paca.training.first_weights import unmoved
from paca.training.memory import peak_memory

_HOUSEKEEPING = {"epoch", "num_tokens", "num_input_tokens_seen", "step_time", "train_tokens_per_second"}
"""What trainers log besides, and a row has under names of its own."""
_SPEEDS = ("_runtime", "_per_second", "_time", "_num_tokens")
_OF_A_ROW = {
    *("step", "epoch", "loss", "tokens", "tokens_per_second", "train_seconds", "seconds", "peak_memory_bytes"),
    *("eval_loss", "eval_seconds"),
}


class MetricsLog:
    """The rows of a run, in memory and in the file.

    A training row has `step, epoch, loss, grad_norm, learning_rate, tokens` (seen so far), `tokens_per_second`,
    `train_seconds` (time in training steps so far), `seconds` (time in the run so far) and `peak_memory_bytes`;
    an evaluation row has `step` and `eval_loss`. Each has what the trainer logs besides, such as
    `rewards/margins`. Step 0 is the model as it came. Of images, `tokens` counts the images.
    """

    def __init__(self, path: Path) -> None:
        """Open the log of a new run (the file is made) or of one that goes on (its rows are read)."""
        self.path = path
        self.rows: list[dict[str, Any]] = read_rows(path) if path.is_file() else []
        with writing(path):
            path.touch()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; numbers that are not finite are stored as null, which JSON has and NaN it has not.

        An evaluation repeated at its step (a run resumed just after it) takes the place of the earlier one.
        """
        row = {name: finite_or_none(value) for name, value in row.items()}
        if "eval_loss" in row and self.eval_metric_at(row["step"], "loss") is not None:
            self.rows = [old for old in self.rows if "eval_loss" not in old or old["step"] != row["step"]]
            self._rewrite()
        self.rows.append(row)
        line = json.dumps(row) + "\n"
        with writing(self.path, len(line)), self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def rewind(self, step: int) -> None:
        """Drop the rows beyond `step`: the run goes on from there and will write them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._rewrite()

    def last_training_row(self) -> dict[str, Any] | None:
        """The newest row of a training step."""
        return next((row for row in reversed(self.rows) if "loss" in row), None)

    def metrics(self) -> list[str]:
        """What the trainer logs of its own, by name; with `eval_` before it, of held-out data."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name not in _OF_A_ROW))

    def last(self, name: str, step: int) -> float | None:
        """The newest value of a metric at `step` or before it; None where there is none."""
        rows = (row for row in reversed(self.rows) if row["step"] <= step)
        return next((row[name] for row in rows if row.get(name) is not None), None)

    def eval_metric_at(self, step: int, name: str) -> float | None:
        """A metric of the held-out data after `step` steps, if it was measured."""
        found = (row.get(f"eval_{name}") for row in reversed(self.rows) if row["step"] == step)
        return next((value for value in found if value is not None), None)

    def _rewrite(self) -> None:
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def finite_or_none(value: Any) -> Any:
    """The value itself, or None for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metrics_of(logs: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in logs.items()
        if isinstance(value, (int, float)) and name not in _HOUSEKEEPING and not name.endswith(_SPEEDS)
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to a line that is none: a crash may cut the last one short."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, LookupError, RecursionError):
            break
        rows.append(row)
    return rows


class RecordMetrics(TrainerCallback):
    """Writes what the trainer logs to a `MetricsLog`, and measures speed and memory.

    The clock of `tokens_per_second` covers forward, backward, optimizer and data loading; evaluations, checkpoints
    and logging stand outside it.
    """

    def __init__(self, log: MetricsLog, device: torch.device, untold_before: str | None = None) -> None:
        """Args:
        log: What it writes.
        device: Whose memory it measures.
        untold_before: A metric of evaluations that is left out until the weights have moved, where it tells nothing.
        """
        self.log = log
        self.device = device
        self.untold_before = untold_before
        last = log.last_training_row() or {}
        self.train_seconds: float = last.get("train_seconds", 0.0)
        self.peak_memory_bytes: int = last.get("peak_memory_bytes", 0)
        self._seconds_before: float = last.get("seconds", 0.0)
        self._started = time.perf_counter()
        self._mark = self._started
        self._tokens_logged: int = last.get("tokens", 0)
        self._train_seconds_logged = self.train_seconds

    @property
    def seconds(self) -> float:
        """Time in this run so far, the sessions before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock, and log with every checkpoint.

        The trainer forgets the losses since its last log when it is resumed, so a checkpoint between two logs would
        leave a hole in the curve.
        """
        if args.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(args.device)  # what the step has left to do there is a part of it
        now = time.perf_counter()
        self.train_seconds += now - self._mark
        self._mark = now
        if control.should_save:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """As `on_step_end`, for `save_strategy: epoch`."""
        if control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the row."""
        logs = logs or {}
        if "loss" in logs:
            self.log.append(self._training_row(state, logs))
        elif "eval_loss" in logs:
            row: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
            row |= _metrics_of(logs)
            if unmoved(args, state):
                row.pop(f"eval_{self.untold_before}", None)
            row["eval_seconds"] = logs.get("eval_runtime")
            row["seconds"] = round(self.seconds, 3)
            self.log.append(row)
        self._mark = time.perf_counter()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the evaluation out of the clock."""
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the checkpoint out of the clock."""
        self._mark = time.perf_counter()

    def _training_row(self, state: TrainerState, logs: dict[str, float]) -> dict[str, Any]:
        tokens = state.num_input_tokens_seen
        elapsed = self.train_seconds - self._train_seconds_logged
        speed = (tokens - self._tokens_logged) / elapsed if elapsed > 0 else 0.0
        self._tokens_logged, self._train_seconds_logged = tokens, self.train_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory(self.device))
        row: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
        row |= _metrics_of(logs)
        row["tokens"] = tokens
        row["tokens_per_second"] = round(speed, 1)
        row["train_seconds"] = round(self.train_seconds, 3)
        row["seconds"] = round(self.seconds, 3)
        row["peak_memory_bytes"] = self.peak_memory_bytes
        return row

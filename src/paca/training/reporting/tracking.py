"""`train.report_to`: what TensorBoard, W&B, Trackio and others get of a run, the trainer's numbers and paca's own."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from paca.messages.errors import PacaError, first_line
from paca.messages.install import how_to_install
from paca.messages.nearest import did_you_mean
from paca.pretrained.whole_output import write_whole
from paca.training.folder.run_folder import RunFolder, read_record, steps_done
from paca.training.reporting.metrics import MetricsLog

EXTRAS = ("tensorboard", "wandb", "trackio")
"""Trackers that are tested here; each is a package, and an extra of ours, of its name."""
PROJECT = "paca"
"""The name of the project in W&B and Trackio where the user gives none."""
ANSWERS = ("question", "reference", "before", "after")
"""Columns of the table of sampled answers."""


def check_trackers(report_to: str | list[str] | None, place: str) -> None:
    """Refuse a tracker that is unknown, or whose package is not installed.

    Args:
        report_to: What the user gave.
        place: Where, for the message.

    Raises:
        PacaError: Says which extra or package to install.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK, "{}")
            raise PacaError(f"{place}: there is no tracker {name}. Give {', '.join(EXTRAS)} or none.{hint}")
        if name in EXTRAS and name not in get_available_reporting_integrations():
            raise PacaError(f"{place}: {name} is not installed. {how_to_install(name)}")
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise PacaError(f"{place}: the package for {name} is not installed. Install it, or leave {name} out.")


def check_login(report_to: str | list[str] | None) -> None:
    """See that W&B would take a run, before minutes are spent on it; in a terminal W&B asks for what it lacks.

    Args:
        report_to: What the user gave.

    Raises:
        PacaError: There is no key, or W&B does not know it, or can't be reached.
    """
    if "wandb" not in ([report_to] if isinstance(report_to, str) else report_to or []):
        return
    import wandb

    try:
        if wandb.run is None and wandb.setup().settings.mode not in ("offline", "dryrun"):  # of which it would warn
            wandb.login()
    except Exception as error:  # whatever it raises
        raise PacaError(
            f"train.report_to: wandb can't be started: {first_line(error)} See to it (`wandb login`), set "
            "WANDB_MODE=offline (`wandb sync` sends the run later), or leave wandb out."
        ) from error


class Trackers(TrainerCallback):
    """Stands for all trackers of a trainer, so that each gets one row a step with paca's own figures in it.

    It takes their callbacks out of the trainer, and passes on what happens. They are closed not with the training but
    with the run, whose held-out scores come after it. Comes after `RecordMetrics` among the callbacks.
    """

    def __init__(self, trainer: Any, folder: RunFolder, log: MetricsLog, checkpoint: Path | None) -> None:
        """Args:
        trainer: Whose trackers they are.
        folder: Of the run. TensorBoard's and W&B's files go there.
        log: Holds paca's figures.
        checkpoint: That the run goes on from; None for a new one.
        """
        self.trainer = trainer
        self.folder = folder
        self.log = log
        self.checkpoint = checkpoint
        kinds = {INTEGRATION_TO_CALLBACK[name]: name for name in trainer.args.report_to}
        found = [callback for callback in trainer.callback_handler.callbacks if type(callback) in kinds]
        self.callbacks = {kinds[type(callback)]: callback for callback in found}
        for callback in found:
            trainer.remove_callback(callback)
        known = read_record(folder.tracking) if checkpoint is not None else {}
        self.id = known.get("id", secrets.token_hex(4))
        if found:
            identity = {"run_name": trainer.args.run_name, "id": self.id}
            write_whole(folder.tracking, json.dumps(identity) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open them.

        Raises:
            PacaError: One does not let itself be opened.
        """
        for name, callback in self.callbacks.items():
            try:
                self._prepare(name, callback)
                callback.on_train_begin(args, state, control, **kwargs)
            except Exception as error:  # of whatever kind a tracker's own package raises: no login, no network
                raise PacaError(
                    f"train.report_to: {name} can't be started: {first_line(error)} See to it, or leave {name} out."
                ) from error

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Pass on what the trainer logs, with the figures of the same step."""
        row = self.log.rows[-1] if self.log.rows else {}
        own = {}
        if "loss" in (logs or {}) and row.get("step") == state.global_step and "peak_memory_bytes" in row:
            own = figures_of(row)
        self._tell({**(logs or {}), **own}, args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass it on: W&B may keep checkpoints."""
        for callback in self.callbacks.values():
            callback.on_save(args, state, control, **kwargs)

    def finish(self, summary: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Send what came out: scores, peak memory and speed of the whole run, and the sampled answers.

        Args:
            summary: The content of `summary.json`.
            warn: Shows the user a line. The run is finished, whatever a tracker does.
        """
        answers = answers_of(summary["scores"] or {})
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        try:
            self._tell(results_of(summary), args, state, control, model=self.trainer.model)
            for name, callback in self.callbacks.items() if answers else ():
                _show_answers(name, callback, answers, state.global_step)
        except Exception as error:
            warn(f"Warning: a tracker did not take the results of the run: {error}")

    def close(self) -> None:
        """Close them, also after an error or a signal."""
        callbacks, self.callbacks = self.callbacks, {}
        args, state, control = self.trainer.args, self.trainer.state, self.trainer.control
        for name, callback in callbacks.items():
            parts = {"model": self.trainer.model, "processing_class": self.trainer.processing_class}
            with _without_false_line(name, callback):
                callback.on_train_end(args, state, control, **parts)
            if name == "wandb":
                callback._wandb.finish()

    def _tell(self, logs: dict[str, Any], args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self.callbacks.values():
            callback.on_log(args, state, control, logs=logs, **kwargs)

    def _prepare(self, name: str, callback: Any) -> None:
        """Where a tracker's files go, and which of its runs a resumed one goes on."""
        if name == "tensorboard" and callback.logging_dir is None:
            # Steps that are made again take the place of the earlier ones.
            past = None if self.checkpoint is None else steps_done(self.checkpoint) + 1
            callback.tb_writer = callback._SummaryWriter(log_dir=str(self.folder.tensorboard), purge_step=past)
        if name == "wandb" and callback._wandb.run is None:
            callback._wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.trainer.args.project),
                name=self.trainer.args.run_name,
                id=os.environ.get("WANDB_RUN_ID", self.id),
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(self.folder.path)),
            )


def _without_false_line(name: str, callback: Any) -> AbstractContextManager[object]:
    """Trackio says at the end that it uploads, also where all of it stays on this machine."""
    run = callback._trackio.context_vars.current_run.get() if name == "trackio" else None
    return redirect_stdout(io.StringIO()) if getattr(run, "_is_local", False) else nullcontext()


def names_for_trackers(folder: RunFolder, *, resume: bool) -> dict[str, str]:
    """Our defaults of `train.project` and `train.run_name`.

    A run is called by its folder and the time; a resumed one as it was when it began.
    """
    known = read_record(folder.tracking) if resume else {}
    return {
        "project": PROJECT,
        "run_name": known.get("run_name", f"{folder.path.name} {datetime.now():%Y-%m-%d %H:%M:%S}"),
    }


def figures_of(row: dict[str, Any]) -> dict[str, float]:
    """Paca's own figures of a training step, from its row of `metrics.jsonl`."""
    return {
        "tokens": row["tokens"],
        "tokens_per_second": row["tokens_per_second"],
        "peak_memory_gib": row["peak_memory_bytes"] / 2**30,
    }


def results_of(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers that came out of a run, from its `summary.json`."""
    found = {f"run_{name}": summary[name] for name in ("tokens_per_second", "seconds", "train_seconds")}
    found["run_peak_memory_gib"] = summary["peak_memory_bytes"] / 2**30
    for side, values in (summary["scores"] or {}).items():
        metrics = [name for name in values if f"{name}_stderr" in values]
        found |= {f"eval_{name}_{side}": values[name] for name in metrics}
    return found


def answers_of(scores: dict[str, Any]) -> list[list[str]]:
    """A row of `ANSWERS` for each sampled question; a side that was not measured is empty."""
    sides = {name: side["samples"] for name, side in scores.items() if side["samples"]}
    count = max(map(len, sides.values()), default=0)
    rows = []
    for number in range(count):
        samples = {name: samples[number] for name, samples in sides.items()}
        one = next(iter(samples.values()))
        answers = [samples[side]["answer"] if side in samples else "" for side in ("before", "after")]
        rows.append([one["question"], one["reference"], *answers])
    return rows


def _show_answers(name: str, callback: Any, answers: list[list[str]], step: int) -> None:
    if name == "tensorboard":
        lines = [ANSWERS, ["---"] * len(ANSWERS), *answers]
        cells = [[text.replace("|", "\\|").replace("\n", "<br>") for text in line] for line in lines]
        callback.tb_writer.add_text("eval/answers", "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
    elif name in ("wandb", "trackio"):
        package = getattr(callback, f"_{name}")
        table = package.Table(columns=list(ANSWERS), data=answers)
        package.log({"eval/answers": table, "train/global_step": step})

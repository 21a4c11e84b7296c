"""A run as one row of `runs.jsonl`. Fields that PEFT's method comparison has are named and nested as there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paca.comparison.methods import own_section
from paca.comparison.training_process import failure_of
from paca.messages.errors import PacaError
from paca.pretrained.whole_output import write_whole
from paca.training.config.strict_yaml import read_yaml
from paca.training.folder.run_folder import RunFolder
from paca.training.reporting.metrics import finite_or_none, read_rows
from paca.training.trainers import trainer_kind

Row = dict[str, Any]

_LOWER_IS_BETTER = ("loss",)
SHARES = ("exact_match", "choice", "accuracy", "rewards/accuracies")
"""Metrics that count each example as right or wrong."""


def row_of(folder: RunFolder, method: str, config_file: Path | None = None) -> Row | None:
    """The row of a run that ended; None while it is not.

    Args:
        folder: Of the run.
        method: What it is called in the comparison.
        config_file: The YAML that it was started with, for a run that failed.

    Raises:
        PacaError: Its summary can't be read.
    """
    failure = failure_of(folder)
    if failure is None and not folder.finished():
        return None
    summary: dict[str, Any] = _summary(folder) if failure is None else {}
    try:
        row = _row(folder, method, config_file, failure, summary)
        if any(isinstance(row[name], (str, list, dict)) for name in ("score", "loss", "steps", "learning_rate")):
            raise TypeError("a text or a list where a number was expected")
    except (AttributeError, TypeError) as error:
        raise PacaError(
            f"{folder.summary} is not as a run leaves it ({error}). Train the run again, or leave it out."
        ) from error
    return _finite(row)


def _row(
    folder: RunFolder, method: str, config_file: Path | None, failure: dict[str, Any] | None, summary: dict[str, Any]
) -> Row:
    config = summary.get("config") or (read_yaml(config_file)[0] if config_file is not None else {})
    train = config.get("train", {})
    wanted = config.get("eval", {}).get("metric") or trainer_kind(train).score
    metric, score = score_of(summary, wanted)
    return {
        "name": folder.path.name,
        "method": method,
        "learning_rate": train.get("learning_rate"),
        "seed": train.get("seed"),
        "metric": metric,
        "lower_is_better": metric in _LOWER_IS_BETTER,
        "score": score,
        "score_stderr": _side(summary, "after").get(f"{metric}_stderr"),
        "right": _side(summary, "after").get("right"),
        "score_before": score_of(summary, wanted, "before")[1],
        "loss": summary.get("eval_loss_after"),
        "loss_before": summary.get("eval_loss_before"),
        # Answers are also scored of examples that are too long for the loss.
        "eval_examples": _side(summary, "after").get("examples") or summary.get("data", {}).get("eval_examples"),
        "steps": summary.get("steps"),
        "tokens": summary.get("tokens"),
        "tokens_per_second": summary.get("tokens_per_second"),
        "run_info": {
            "created_at": summary.get("finished"),
            "total_time": summary.get("seconds"),
            "experiment_name": f"{method}/{folder.path.name}",
            "train_config": {
                "model_id": config.get("model", {}).get("name"),
                "dtype": summary.get("model", {}).get("dtype"),
                "max_seq_length": train.get("max_length"),
                "batch_size": train.get("per_device_train_batch_size"),
                "batch_size_eval": train.get("per_device_eval_batch_size"),
                "max_steps": summary.get("steps"),
                "seed": train.get("seed"),
                "grad_norm_clip": train.get("max_grad_norm"),
                "optimizer_type": train.get("optim"),
                "optimizer_kwargs": {"lr": train.get("learning_rate"), "weight_decay": train.get("weight_decay")},
                "lr_scheduler": train.get("lr_scheduler_type"),
                "autocast_adapter_dtype": train.get("autocast_adapter_dtype"),
            },
            "peft_config": _peft_config(config),
            "config": config,
            "contents": folder.recorded_inputs(),
            "error_msg": "" if failure is None else failure["error_msg"],
        },
        "train_info": {
            "accelerator_memory_max": summary.get("peak_memory_bytes"),
            "accelerator_memory_of": summary.get("peak_memory_of"),
            "train_time": summary.get("train_seconds"),
            "file_size": _file_size(folder),
            "num_trainable_params": summary.get("trainable_parameters"),
            "num_total_params": summary.get("model", {}).get("parameters"),
            "status": "success" if failure is None else "failed",
            "metrics": _metrics(folder, metric, score, summary.get("kept_step")),
        },
        "meta_info": {
            "package_info": {f"{name}-version": number for name, number in summary.get("versions", {}).items()},
            "system_info": summary.get("hardware"),
            "git": summary.get("git"),
            "code": summary.get("code"),
            "command": summary.get("command"),
        },
    }


def _summary(folder: RunFolder) -> dict[str, Any]:
    try:
        found = folder.read_summary()
    except (ValueError, RecursionError) as error:
        raise PacaError(f"{folder.summary} is broken ({error}). Train the run again, or leave it out.") from error
    if not isinstance(found, dict):
        raise PacaError(f"{folder.summary} holds no JSON object. Train the run again, or leave it out.")
    return _finite(found)


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else finite_or_none(value)


def score_of(summary: dict[str, Any], metric: str | None, when: str = "after") -> tuple[str, float | None]:
    """What a run is judged by, and its value.

    Args:
        summary: Of the run; empty where it failed.
        metric: Its `eval.metric`, or what its trainer measures; None means the held-out loss.
        when: `"before"` or `"after"` training.
    """
    if metric is None:
        return "loss", summary.get(f"eval_loss_{when}")
    return metric, _side(summary, when).get(metric)


def _side(summary: dict[str, Any], when: str) -> dict[str, Any]:
    return (summary.get("scores") or {}).get(when) or {}


def write_rows(path: Path, rows: list[Row]) -> None:
    """One line a run, whole: readers and other processes see the old file or the new one."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _peft_config(config: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    kind = own_section(config)
    if not config or kind == "full":
        return None
    return {**({} if kind == "peft" else {"peft_type": kind.upper()}), **config.get(kind, {})}


def _file_size(folder: RunFolder) -> int | None:
    """Bytes of the weights that the run saved."""
    saved = [*folder.path.glob("adapter/*.safetensors"), *folder.path.glob("model/*.safetensors")]
    return sum(file.stat().st_size for file in saved) or None


def _metrics(folder: RunFolder, metric: str, score: float | None, kept: int | None) -> list[dict[str, Any]]:
    """One entry an evaluation, with the training loss before it; the last one has the score, of the weights kept."""
    entries: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for row in read_rows(folder.metrics) if folder.metrics.is_file() else []:
        if "eval_loss" in row:
            names = {"loss": "train loss", "tokens": "train total tokens", "train_seconds": "train time"}
            known = {name: last[key] for key, name in names.items() if key in last}
            entries.append({"step": row["step"], "valid loss": row["eval_loss"], **known})
        elif "loss" in row:
            last = row
    if score is not None and metric != "loss":
        entries.append({"step": last.get("step") if kept is None else kept, f"test {metric}": score})
    return entries

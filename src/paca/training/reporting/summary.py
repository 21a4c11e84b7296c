"""summary.json: what a finished run was, and what came out. docs/guides/training.md explains its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from paca.training.folder.checkpoints import kept_step
from paca.training.folder.provenance import code_state, command_line, git_state, hardware, now, versions
from paca.training.memory import describe_peak_memory, peak_memory
from paca.training.plan import Plan
from paca.training.reporting.metrics import RecordMetrics, finite_or_none
from paca.training.trainers import trainer_kind


def summary_of(
    plan: Plan, state: TrainerState, recorder: RecordMetrics, arguments: TrainingArguments, loss_after: float | None
) -> dict[str, Any]:
    """The summary of a run whose training is over. Its `scores` are None: to measure them takes memory of its own.

    Args:
        plan: What was trained.
        state: Of the trainer.
        recorder: What measured it.
        arguments: Of the trainer.
        loss_after: The held-out loss, where it was measured.
    """
    device: torch.device = arguments.device
    config, tokens, train_seconds = plan.config, state.num_input_tokens_seen, recorder.train_seconds
    kind, log, data = trainer_kind(config.train), recorder.log, plan.data
    kept = kept_step(state, arguments)
    return {
        "name": Path(config.output.dir).name,
        "finished": now(),
        "command": command_line(),
        "model": {
            "name": config.model.name,
            "source": plan.source,
            "architecture": plan.architecture,
            "parameters": plan.parameters,
            "dtype": plan.dtype,
            "quantization": config.model.quantization,
            "lean": config.model.lean,
            "recompute": config.model.recompute,
        },
        "data": {
            "train": config.data.train,
            "eval": config.data.eval,
            "format": data.train.format,
            "description": data.train.description,
            "template": data.template,
            "system": data.system,
            "sample": None if data.sample is None else data.sample.as_dict(),
            "train_examples": plan.train_examples,
            "eval_examples": plan.eval_examples,
            "left_out": plan.left_out,
        },
        "trainer": kind.name,
        "method": {
            "name": plan.method,
            "settings": config.adapter,
            "autocast_adapter_dtype": config.train.get("autocast_adapter_dtype"),
        },
        "targets": plan.targets,
        "adapted_layers": plan.adapted_layers,
        "trainable_parameters": plan.trainable_parameters,
        "trainable_percent": 100 * plan.trainable_parameters / plan.parameters,
        "eval_loss_before": recorder.log.eval_metric_at(0, "loss"),
        "eval_loss_after": finite_or_none(loss_after),
        "scores": None,
        "metrics": {name: log.last(name, kept) for name in log.metrics()},
        "steps": state.global_step,
        "kept_step": kept,
        "epochs": state.epoch,
        "tokens": tokens,
        "counts": kind.counts,
        "seconds": round(recorder.seconds, 3),
        "train_seconds": round(train_seconds, 3),
        "tokens_per_second": round(tokens / train_seconds, 1) if train_seconds else 0.0,
        "peak_memory_bytes": max(recorder.peak_memory_bytes, peak_memory(device)),
        "peak_memory_of": describe_peak_memory(device),
        "processes": plan.processes,
        "versions": versions(),
        "hardware": hardware(device),
        "git": git_state(Path.cwd()),
        "code": code_state(),
        "config": config.as_dict(),
    }

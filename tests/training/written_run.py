"""What a run writes, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paca.training.reporting.metrics import MetricsLog


def write_run(folder: Path, steps: int, scores: dict[str, Any] | None = None) -> Path:
    """A run after so many steps, or the same one later; with `scores` it is finished.

    Returns:
        Its folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("model: {name: some/model}\npaca: {r: 4}\n", encoding="utf-8")
    log = MetricsLog(folder / "metrics.jsonl")
    if not log.rows:
        log.append({"step": 0, "eval_loss": 3.0, "eval_seconds": 0.1, "seconds": 1.0})
    last = log.last_training_row() or {"step": 0}
    for step in range(last["step"] + 1, steps + 1):
        speed = {"tokens": 100 * step, "tokens_per_second": 50.0, "train_seconds": 2.0 * step, "seconds": 3.0 * step}
        log.append({"step": step, "loss": 3.0 / step, **speed, "peak_memory_bytes": 2**29})
    if scores is not None:
        whole = {"tokens_per_second": 50.0, "seconds": 9.0, "train_seconds": 8.0, "peak_memory_bytes": 2**29}
        (folder / "summary.json").write_text(json.dumps({"steps": steps, "scores": scores, **whole}), encoding="utf-8")
    return folder

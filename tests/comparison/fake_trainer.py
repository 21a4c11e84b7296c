"""Stands in for `paca train` where only what lies around it is tested: it trains nothing, and takes no time for it.

`python fake_trainer.py train CONFIG [--resume]` leaves a run folder whose numbers follow from the config alone. It
waits at a step while there is a file `hold` beside the config's folder, and fails where the config asks for it, a file
`away` there names the run, or there is a file `full`.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STEPS = 6
HOLDS_AT = 4
PER_STEP = 2.0  # seconds, it says


def loss_at(config: dict[str, Any], step: int) -> float:
    """The lowest is at a rate of 3e-3; a seed moves it a little, and each method its own way."""
    kind = next(name for name in ("paca", "lora", "peft", "full") if name in config)
    distance = math.log10((config["train"]["learning_rate"] or 1e-9) / 3e-3)
    luck = ((config["train"]["seed"] * 7919 + sum(kind.encode())) % 11) / 1000
    level = {"paca": 1.0, "lora": 1.2}.get(kind, 1.1)
    return level + distance**2 + luck + 1 / (step + 1)


def main() -> None:
    config_path = Path(sys.argv[2])
    config = yaml.safe_load(config_path.read_text())
    folder = Path(config["output"]["dir"])
    first = 0
    if "--resume" in sys.argv:
        saved = max(int(path.name.partition("-")[2]) for path in (folder / "checkpoints").iterdir())
        first = saved
        print(f"Resuming after step {saved}.")
    else:
        for part in ("checkpoints", "adapter"):
            shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_path.read_text())
    away = config_path.parents[1] / "away"
    if away.is_file() and folder.name in _lines(away):
        sys.exit("Error: There is no folder of a model, some/model. Give one.")
    stopped = []
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    rows = [json.loads(line) for line in _lines(folder / "metrics.jsonl")][: first + 1] if first else []
    if not rows:
        rows = [{"step": 0, "eval_loss": loss_at(config, 0)}]
    for step in range(first + 1, STEPS + 1):
        if config["train"].get("weight_decay") == 13 and step == 3:
            sys.exit("Error: The training loss is nan at step 3.")
        rows.append(
            {"step": step, "loss": loss_at(config, step), "tokens": 100 * step, "train_seconds": PER_STEP * step}
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        while step == HOLDS_AT and (config_path.parents[1] / "hold").exists() and not stopped:
            time.sleep(0.01)
        if stopped or step == 2:
            save_checkpoint(folder / "checkpoints" / f"checkpoint-{step}", step)
        if stopped:
            sys.exit(130)
        if step == 2 and (config_path.parents[1] / "full").exists():
            sys.exit(f"Error: The disk is full: {folder / 'checkpoints'} could not be written. 7 bytes are free in it.")
    loss = loss_at(config, STEPS)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS, "eval_loss": loss}) + "\n")
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 64)
    (folder / "summary.json").write_text(json.dumps(summary(config, loss)))


def summary(config: dict[str, Any], loss: float) -> dict[str, Any]:
    """As `paca train` leaves it, as far as a comparison reads it."""
    return {
        "finished": "2026-01-01T00:00:00+00:00",
        "command": "paca train",
        "model": {"name": config["model"]["name"], "parameters": 1000, "dtype": "float32"},
        "trainable_parameters": 10,
        "eval_loss_before": loss_at(config, 0),
        "eval_loss_after": loss,
        "scores": None,
        "steps": STEPS,
        "tokens": 100 * STEPS,
        "seconds": PER_STEP * STEPS + 1,
        "train_seconds": PER_STEP * STEPS,
        "tokens_per_second": 50.0,
        "peak_memory_bytes": 2**30,
        "peak_memory_of": "resident set of the process",
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "some", "device": "cpu"},
        "git": {"commit": "abc", "dirty": False},
        "code": {"commit": "def", "dirty": True},
        "config": config,
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def save_checkpoint(path: Path, step: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        (path / name).touch()
    state = json.dumps({"global_step": step})
    (path / "trainer_state.json").write_text(state)
    sizes = {"optimizer.pt": 0, "scheduler.pt": 0, "trainer_state.json": len(state)}
    (path / "whole.json").write_text(json.dumps(sizes))  # as `RunFolder.mark_whole`


if __name__ == "__main__":
    main()

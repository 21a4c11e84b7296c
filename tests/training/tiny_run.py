"""A model, data and a config so small that a run takes a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tiny_checkpoint import save_base

WORDS = ("a", "the", "cat", "dog", "sees", "likes", "small", "big", "tree", "river", "runs", "sleeps")

CONFIG = """\
model:
  name: {folder}/model
data:
  train: {folder}/train.jsonl
  eval: 8
paca:
  r: 4
train:
  max_steps: 10
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  per_device_eval_batch_size: 4
  learning_rate: 1e-2
  max_length: 128
output:
  dir: {folder}/run
"""


QUICK = (
    CONFIG.replace("max_steps: 10", "max_steps: 6")
    .replace("train_batch_size: 2", "train_batch_size: 8")
    .replace("accumulation_steps: 2", "accumulation_steps: 1")
    .replace("eval_batch_size: 4", "eval_batch_size: 8")
)
"""As many epochs in half of the time: few passes, each of a large batch."""


def save_workspace(folder: Path, config: str = CONFIG) -> Path:
    """Write `model/` (with dropout, so that the random generators matter), `train.jsonl` (32 + 8 records: 8 steps
    an epoch under CONFIG, 4 under QUICK) and `config.yaml`.

    Returns:
        The config file.
    """
    save_base(folder / "model")
    model_config = folder / "model" / "config.json"
    model_config.write_text(json.dumps(json.loads(model_config.read_text()) | {"attention_dropout": 0.2}))
    words = random.Random(0)
    records = [
        {"prompt": " ".join(words.choices(WORDS, k=3)) + "\n", "completion": " ".join(words.choices(WORDS, k=4))}
        for _ in range(40)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = folder / "config.yaml"
    file.write_text(config.format(folder=folder))
    return file


def place_of_curve(points: object, title: str, **_: object) -> str:
    """In the place of `paca.training.reporting.curves.curve`: pictures take half of the time of so short a run."""
    return f'<svg role="img" aria-label="{title} over steps"></svg>'


def place_of_curves(*_: object) -> str:
    """In the place of `paca.training.reporting.curves.loss_curves`."""
    return place_of_curve((), "Training loss and held-out loss")


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What of the metrics must not depend on how often the run was stopped."""
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    return [tuple(row.get(name) for name in names) for row in rows(run)]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the trained adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_adapter(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

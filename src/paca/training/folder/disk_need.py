"""How much a run is going to write, before it begins."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.messages.units import format_bytes
from paca.planning.optimizer_state import known, optimizer_of, state_bytes
from paca.pretrained.changed_base import not_saved
from paca.pretrained.location import tokenizer_files
from paca.training.config.run_config import RunConfig
from paca.training.folder.checkpoints import size_on_disk
from paca.training.plain_lora import bytes_besides


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of a run's files, about."""

    result: int
    """Of the adapter, or of the whole model."""
    checkpoint: int
    """Of one, with the state of the optimizer where it is saved."""
    checkpoints: int
    """That are there at the same time."""
    base: int
    """Of the plain copy that a GGUF file needs; 0 without one."""
    start: int = 0
    """Of what an adapter began with, where a run keeps it; 0 elsewhere."""

    @property
    def total(self) -> int:
        return self.result + self.checkpoints * self.checkpoint + self.base + self.start

    def __str__(self) -> str:
        parts = [f"result {format_bytes(self.result)}"]
        if self.checkpoints:
            count = (
                f"at most {self.checkpoints} checkpoints at a time, each" if self.checkpoints > 1 else "a checkpoint of"
            )
            parts.append(f"{count} {format_bytes(self.checkpoint)}")
        if self.start:
            parts.append(f"what it starts with {format_bytes(self.start)}")
        if self.base:
            parts.append(f"the base as a checkpoint {format_bytes(self.base)}")
        return f"about {format_bytes(self.total)} ({', '.join(parts)})"


def disk_need(config: RunConfig, model: nn.Module, steps: int | None, base: int) -> DiskNeed:
    """What a run writes.

    Args:
        config: With its defaults.
        model: With its adapter; weights are not needed.
        steps: Of the run; None where they are not known yet.
        base: Bytes of the plain copy of a GGUF file.
    """
    train = config.train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in trained)
    if config.model.quantization is not None and config.method != "paca":
        weights = 2 * sum(parameter.numel() for parameter in trained)  # TRL casts to bfloat16
    files = tokenizer_files(Path(config.model.tokenizer or config.model.adapter or config.model.name).expanduser())
    tokenizer = sum(file.stat().st_size for file in files)
    more, more_in_checkpoint = bytes_besides(model, config.adapter)
    optimizer = optimizer_of(train)
    state = state_bytes(optimizer if known(optimizer) else "adamw_torch", trained)
    return DiskNeed(
        weights + more + tokenizer,
        weights + more_in_checkpoint + tokenizer + (0 if train.get("save_only_model") else state),
        _checkpoints(train, steps),
        base,
        _start(model, config.adapter, more),
    )


def _start(model: nn.Module, settings: Mapping[str, Any], taken: int) -> int:
    """Bytes of the start that a run keeps; `taken` is what the adapter has of it."""
    if settings.get("init_lora_weights") != "eva":
        return taken if not_saved(settings) else 0
    return sum(8 * weight.numel() for name, weight in model.named_parameters() if ".lora_A." in name)  # in float64


def _checkpoints(train: dict[str, Any], steps: int | None) -> int:
    """How many are there at most: an old one goes when the new one is whole."""
    if train["save_strategy"] == "no":
        return 0
    saves, limit = _saves(train, steps), train.get("save_total_limit")
    if limit is None:
        return saves or 1
    kept = max(limit, 2) if train.get("load_best_model_at_end") else limit  # the best one and the last
    return min(kept + 1, saves or kept + 1)


def _saves(train: dict[str, Any], steps: int | None) -> int | None:
    """How many are written."""
    if train["save_strategy"] == "epoch" and train.get("max_steps", -1) < 1:
        return math.ceil(train["num_train_epochs"])
    if steps is None or train["save_strategy"] != "steps":
        return None
    every = train["save_steps"]
    return math.ceil(steps / (math.ceil(steps * every) if every < 1 else every))


def tell_of_disk(need: DiskNeed, folder: Path, console: Console) -> None:
    """Warn if the disk may get full.

    Args:
        need: Of the run.
        folder: Of the run. What is in it already makes room, or is a part of what is needed.
        console: Where a warning is shown.

    Raises:
        PacaError: Not even the result fits.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    room = free + size_on_disk(folder)
    told = f"{format_bytes(free)} is free in {place}, and this run writes {need}."
    if need.result > room:
        raise PacaError(f"{told} Not even the result fits. Make room, or give another output.dir.")
    if need.total > room:
        advice = "Make room, give another output.dir, or keep fewer checkpoints (train.save_total_limit)."
        say(console, f"Warning: {told} It may stop with a full disk. {advice}", style="yellow")

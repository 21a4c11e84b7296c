"""The bytes of a training's tensors, counted: on a CPU, resident sets of equal runs differ by more than methods do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from paca.pretrained.whole_output import write_whole
from paca.training.config.strict_yaml import read_yaml
from paca.training.trainers import trainer_kind

PROGRAM = (sys.executable, "-m", "paca.cli.train_counting_memory")
_FIRST_PASS = "paca: the first pass in training"


def peak_of(config: Path) -> int:
    """What was counted in a training with this YAML, in bytes."""
    return json.loads(peak_file(config).read_text(encoding="utf-8"))["peak_bytes"]


def count(train: Callable[[], None], config: Path) -> None:
    """Train with this YAML, and leave what was counted in a JSON file beside it.

    That is the most bytes that the tensors had at a time, weights included, from the first pass in training on. (What
    is loaded before may take more.) The longest batch comes first, as a few steps of a run need not meet it.

    Args:
        train: Runs `paca train` as `sys.argv` has it.
        config: The YAML named there.
    """
    peak_file(config).unlink(missing_ok=True)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    if trainer_kind(read_yaml(config)[0].get("train", {})).probed:
        sys.argv.append("--probe")
    with profiler, _first_pass_marked():
        try:
            train()
        except SystemExit as end:
            if end.code:
                raise
    write_whole(peak_file(config), json.dumps({"peak_bytes": _peak(profiler)}) + "\n")


def _first_pass_marked() -> RemovableHandle:
    def mark(module: nn.Module, *call: object) -> None:
        if module.training and torch.is_grad_enabled():
            hook.remove()
            with torch.profiler.record_function(_FIRST_PASS):
                pass

    hook = register_module_forward_pre_hook(mark)
    return hook


def _peak(profiler: Any) -> int:
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    begin = next(event.start_time_ns for event in events if event.name == _FIRST_PASS)
    allocations = (event for event in events if event.name == "[memory]" and event.start_time_ns >= begin)
    return max(event.typed[1].total_allocated for event in allocations)


def _events(tree: list[Any]) -> Iterator[Any]:
    left = list(tree)
    while left:
        event = left.pop()
        left.extend(event.children)
        yield event


def peak_file(config: Path) -> Path:
    """Where that is left."""
    return config.with_name(f"{config.stem}-counted_memory.json")

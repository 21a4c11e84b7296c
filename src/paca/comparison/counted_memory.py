"""`paca train` with its tensors' bytes counted: on a CPU, resident sets of equal runs differ by more than methods do.

`python -m paca.comparison.counted_memory train CONFIG` trains as `paca train CONFIG` does. Beside the YAML it leaves a
JSON file with the most bytes that the tensors had at a time, weights included, from the end of the first step on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from paca.training.folder.run_folder import write_whole
from paca_command import main as train

PROGRAM = (sys.executable, "-m", "paca.comparison.counted_memory")
_FIRST_STEP = "paca: the first step was made"


def peak_of(config: Path) -> int:
    """What was counted in a training with this YAML, in bytes."""
    return json.loads(peak_file(config).read_text(encoding="utf-8"))["peak_bytes"]


def _main() -> None:
    config = Path(sys.argv[2])
    peak_file(config).unlink(missing_ok=True)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler, _end_of_first_step_marked():
        try:
            train()
        except SystemExit as end:
            if end.code:
                raise
    write_whole(peak_file(config), json.dumps({"peak_bytes": _peak(profiler)}) + "\n")


def _end_of_first_step_marked() -> RemovableHandle:
    def mark(*call: object) -> None:
        hook.remove()
        with torch.profiler.record_function(_FIRST_STEP):
            pass

    hook = register_optimizer_step_post_hook(mark)
    return hook


def _peak(profiler: Any) -> int:
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    begin = next(event.start_time_ns for event in events if event.name == _FIRST_STEP)
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


if __name__ == "__main__":
    _main()

"""A process that runs one method alone, so that its memory is its own.

Reads JSON lines on standard input: first the settings and the method, then batches to run. Answers each with one JSON
line on standard output. Started by `paca.bench.child_process`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.memory_in_use import AllocatedOnCuda, ResidentSet
from paca.bench.methods import MethodUnavailable, find_methods
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.messages.out_of_memory import failure_reason, is_out_of_memory
from paca.training.freed_memory import keep_freed_memory

_STEPS = 2  # the optimizer's state exists from the first step on, so the second one has the peak


def serve(requests: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more.

    Args:
        requests: One JSON object per line.
        answer: Called with each answer.
    """
    job = json.loads(requests.readline())
    settings, (method,) = BenchSettings.from_dict(job["settings"]), find_methods([job["method"]])
    device = settings.torch_device
    _load_libraries(device, settings.torch_dtype)
    memory: AllocatedOnCuda | ResidentSet
    if device.type == "cuda":
        memory = AllocatedOnCuda(device, settings.memory)
    else:
        keep_freed_memory()  # as paca train does, so that the peak is the one that training has
        memory = ResidentSet()
    libraries = memory.now()
    try:
        base = build_base_model(settings, method.four_bit)
        weights = memory.now()
        model = method.apply(base.model, settings.rank)
    except (MethodUnavailable, RuntimeError, MemoryError) as error:
        answer({"failed": f"while the model was made: {failure_reason(error)}"})
    else:
        answer({"libraries": libraries, "weights": weights, "source": memory.source})
        for line in requests:
            answer(_measure(model, base, settings, Point(**json.loads(line)), memory, libraries))


def _load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Run one small step of everything, so that what loads with the first GEMM isn't counted later."""
    block = torch.nn.TransformerEncoderLayer(64, 1, 64, dropout=0.0, batch_first=True, device=device, dtype=dtype)
    block(torch.ones(1, 64, 64, device=device, dtype=dtype)).sum().backward()
    torch.optim.AdamW(block.parameters(), fused=True).step()


def _measure(
    model: torch.nn.Module,
    base: BaseModel,
    settings: BenchSettings,
    point: Point,
    memory: AllocatedOnCuda | ResidentSet,
    libraries: int,
) -> dict[str, Any]:
    memory.now()
    memory.reset()
    try:
        step = TrainingStep(model, base, settings, point)
        for _ in range(_STEPS):
            step.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False, "peak": None, "reason": "out of memory"}
    peak = memory.peak()
    fits = settings.memory is None or peak - libraries <= settings.memory
    return {"fits": fits, "peak": peak, "reason": None if fits else "over the budget"}


def main() -> None:
    """The program: standard output is for answers; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()

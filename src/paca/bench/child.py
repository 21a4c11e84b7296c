"""A process that runs one method alone, so that its memory is its own.

Reads JSON lines on standard input: first the settings and the method, then batches to run. Answers each with one JSON
line on standard output. Started by `paca.bench.child_process`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import torch

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.device import synchronize
from paca.bench.four_bit import require_bitsandbytes
from paca.bench.method import Adaptation, MethodUnavailable, apply_method
from paca.bench.methods import METHODS
from paca.bench.resident_set import ResidentSetPeak
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.messages.errors import PacaError
from paca.messages.out_of_memory import is_out_of_memory

_STEPS = 2  # the optimizer's state exists from the first step on, so the second one has the peak


class _Memory:
    """Bytes in use: the CUDA allocator's counters, or the resident set."""

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self.device = device
        self.resident = ResidentSetPeak() if device.type != "cuda" else None
        self.source = f"resident set ({self.resident.source})" if self.resident else "CUDA allocator"
        if device.type == "cuda" and budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)

    def now(self) -> int:
        if self.resident is not None:
            return self.resident.now()
        synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        if self.resident is not None:
            self.resident.reset()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        if self.resident is not None:
            return self.resident.peak()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def serve(requests: TextIO, answer: Any) -> None:
    """Answer requests until there are no more.

    Args:
        requests: one JSON object per line.
        answer: called with each answer, a dict.
    """
    job = json.loads(requests.readline())
    settings, method = BenchSettings.from_dict(job["settings"]), METHODS[job["method"]]
    device = settings.torch_device
    _load_libraries(device, settings.torch_dtype)
    memory = _Memory(device, settings.memory)
    libraries = memory.now()
    try:
        if method.four_bit:
            require_bitsandbytes()
        base = build_base_model(settings, method.four_bit)
        weights = memory.now()
        model = apply_method(method, base.model, Adaptation(settings.rank, base.targets))
    except MethodUnavailable as error:
        answer({"unavailable": str(error)})
        return
    except PacaError as error:
        answer({"refused": str(error)})
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        answer({"unavailable": "out of memory while the model is made"})
        return
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
    memory: _Memory,
    libraries: int,
) -> dict[str, Any]:
    memory.now()
    memory.reset()
    try:
        step = TrainingStep(model, base, settings, point)
        for _ in range(_STEPS):
            step.run()
    except RuntimeError as error:
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

"""A process that runs one method alone, so that its memory is its own: both ends of the pipe to it."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, BinaryIO

import psutil
import torch

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.limits import Probe
from paca.bench.memory_in_use import AllocatedOnCuda, ResidentSet
from paca.bench.methods import MethodUnavailable, find_methods
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep
from paca.lean.float32_products import fastest_products
from paca.pretrained.out_of_memory import failure_reason, is_out_of_memory
from paca.training.freed_memory import keep_freed_memory

_WATCH_PERIOD = 0.005  # seconds
_STEPS = 2  # the optimizer's state exists from the first step on, so the second one has the peak
_OVER = "over the budget"


class ChildFailed(Exception):
    """The child could not measure; the text says why."""


class MeasuringChild:
    """One method in a process of its own, stopped as soon as it holds more than `settings.memory` above its libraries.

    Raises:
        ChildFailed: The model could not be made, or the process ended before it was ready.
    """

    def __init__(self, settings: BenchSettings, method: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        command = [sys.executable, "-m", "paca.bench.child_process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._over_budget = False
        ready = self._ask((settings, method))
        if isinstance(ready, str):
            self.close()
            raise ChildFailed(ready)
        # Bytes before the model was made; with it, before the method changed it; what counted them.
        self.libraries, self.weights, self.source = ready
        if settings.memory is not None and settings.torch_device.type != "cuda":
            limit = self.libraries + settings.memory
            threading.Thread(target=self._watch, args=(limit,), daemon=True).start()

    def run(self, point: Point) -> Probe:
        """Run two steps of this size; ChildFailed if the process ended, for another reason than its budget."""
        try:
            return self._ask(point)
        except ChildFailed:
            if not self._over_budget:
                raise
            return Probe(False, None, _OVER)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> MeasuringChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: Any) -> Any:
        process: Any = self._process
        try:
            pickle.dump(message, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (BrokenPipeError, EOFError):
            status = process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
        how = "was killed, most likely because the machine ran out of memory" if status == -9 else "failed"
        raise ChildFailed(f"the measuring process {how} (exit status {status}): {said[-1]}")

    def _watch(self, limit: int) -> None:
        stop = threading.Event()
        try:
            watched = psutil.Process(self._process.pid)
            while not stop.wait(_WATCH_PERIOD):
                if watched.memory_info().rss > limit:
                    self._over_budget = True
                    watched.kill()
                    return
        except psutil.NoSuchProcess:
            return


def serve(settings: BenchSettings, name: str, points: Iterable[Point], answer: Callable[[Any], None]) -> None:
    """The child's end: make the model of the method `name`, then measure each of `points`.

    The first answer is `(libraries, weights, source)`, or a text that says why there is no model; each further one is a
    `Probe`.
    """
    (method,) = find_methods([name])
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
        answer(f"while the model was made: {failure_reason(error)}")
        return
    answer((libraries, weights, memory.source))
    with fastest_products(device, settings.torch_dtype):  # as paca train
        for point in points:
            answer(_measure(model, base, settings, point, memory, libraries))


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
) -> Probe:
    if torch.cuda.is_available():  # a step before this one may have failed for want of memory, and left some of it
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    memory.now()
    memory.reset()
    try:
        step = TrainingStep(model, base, settings, point)
        for _ in range(_STEPS):
            step.run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Probe(False, None, failure_reason(error))
    peak = memory.peak()
    fits = settings.memory is None or peak - libraries <= settings.memory
    return Probe(fits, peak, None if fits else _OVER)


def _main() -> None:
    """The program: standard output is for answers; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(message: Any) -> None:
        pickle.dump(message, answers)
        answers.flush()

    settings, method = pickle.load(sys.stdin.buffer)
    serve(settings, method, _points(sys.stdin.buffer), answer)


def _points(requests: BinaryIO) -> Iterator[Point]:
    while True:
        try:
            yield pickle.load(requests)
        except EOFError:
            return


if __name__ == "__main__":
    _main()

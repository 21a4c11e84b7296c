"""Where a step's time goes: its phases, its kinds of operators, and how many kernels it launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from paca.bench.step import TrainingStep

PHASES = ("forward", "backward", "optimizer")
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation", "aten::mkldnn_linear"}
_CONVOLUTIONS = ("aten::convolution", "aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::thnn_conv2d")
_GATHERS = {"aten::index_select", "aten::gather", "aten::index"}
_CASTS = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}
_COPIES_OF_COLUMNS = {"aten::copy_", "aten::clone", "aten::cat"}
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
_OPTIMIZER = "paca.bench: optimizer"


def time_phases(step: TrainingStep) -> dict[str, float]:
    """Seconds of each phase of one step; the optimizer's includes PaCA's writing of the columns.

    Waiting for the device between the phases makes the sum larger than a step that is not split.
    """
    times = [step.clock()]
    result = step.forward()
    times.append(step.clock())
    step.backward(result)
    times.append(step.clock())
    step.update()
    times.append(step.clock())
    return {name: end - start for name, (start, end) in zip(PHASES, pairwise(times), strict=True)}


def profile_step(step: TrainingStep, rank: int, repeats: int = 3) -> dict[str, float]:
    """Seconds per step and kind of work, from torch.profiler over `repeats` steps; `step` is eager and warmed up.

    On a CPU the kinds add up to the step as it ran under the profiler (which makes it slower); `Python and autograd` is
    what no operator accounts for. On CUDA they are the kernels' times; `idle` is the rest of the step. A matrix product
    with a dimension of size `rank` is a skinny one.
    """
    cuda = step.device.type == "cuda"
    ours = {kind.__name__ for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("paca.")}
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        start = step.clock()
        for _ in range(repeats):
            step.backward(step.forward())
            with record_function(_OPTIMIZER):
                step.update()
        seconds = (step.clock() - start) / repeats

    found: dict[str, float] = defaultdict(float)
    for event in _events(step, run):
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = _kind(event, rank, ours)
        if kind is not None and microseconds > 0:
            found[kind] += microseconds / 1e6 / repeats
    rest = "idle" if cuda else "Python and autograd"
    found[rest] = max(0.0, seconds - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def count_launches(step: TrainingStep, *, optimizer: bool = True) -> float:
    """Kernels that a step launches on CUDA, with or without its optimizer's part; a CUDA graph is one launch.

    A CPU launches none. There it is the number of operators that are called from outside of operators.
    """
    for _ in range(3):  # so that everything is compiled
        step.run()
    run = step.run if optimizer else lambda: step.backward(step.forward())
    events = _events(step, run)
    step.update()
    if step.device.type == "cuda":
        return float(sum(event.name.startswith(_LAUNCHES) for event in events))
    return float(sum(_is_operator(event) and not _is_operator(event.cpu_parent) for event in events))


def _events(step: TrainingStep, run: Callable[[], Any]) -> list[Any]:
    cuda = [ProfilerActivity.CUDA] if step.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True) as profiler:
        run()
        step.clock()  # waits for the device
    return list(profiler.events() or ())


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith(("aten::", "mkldnn::", "bitsandbytes::"))


def _kind(event: Any, rank: int, ours: set[str]) -> str | None:
    """What the event's own time was spent on; None for what isn't an operator.

    Columns that lie side by side are copied as blocks within the forward pass of one of `ours`, the names of the
    package's autograd functions, and so count as gathered.
    """
    name: str = event.name
    if "::" not in name or name.startswith(("autograd::", _OPTIMIZER)) or str(event.device_type).endswith("CUDA"):
        return None  # a kernel is counted with the operator that launched it
    ancestor, takes_columns = event.cpu_parent, name in _GATHERS
    while ancestor is not None:
        if ancestor.name == _OPTIMIZER:
            return "optimizer"
        takes_columns |= ancestor.name in ours and name in _COPIES_OF_COLUMNS
        ancestor = ancestor.cpu_parent
    if takes_columns:
        return "gather"
    if name in _MATMULS:
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        return "skinny GEMM" if rank in sizes else "GEMM"
    if any(word in name for word in ("scaled_dot_product", "flash_attention", "efficient_attention")):
        return "attention"
    if name.startswith(_CONVOLUTIONS):
        return "convolution"
    return "copies and casts" if name in _CASTS else "elementwise, norms, reductions"

"""Where a step's time goes: its phases, and its kinds of operators."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from paca.bench.device import clock
from paca.bench.step import TrainingStep
from paca.layers import paca_layers
from paca.tuner.entry import write_layers

PHASES = ("forward", "backward", "optimizer", "refresh")
_MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation", "aten::mkldnn_linear"}
_CONVOLUTIONS = ("aten::convolution", "aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::thnn_conv2d")
_GATHERS = {"aten::index_select", "aten::gather", "aten::index"}
_CASTS = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"}
_COPIES_OF_COLUMNS = {"aten::copy_", "aten::clone", "aten::cat"}
_FORWARD = "_PartialLinear"
"""The forward pass of an adapted layer, where columns that lie side by side are copied as blocks."""
_RANGE = "paca.bench: "


def time_phases(step: TrainingStep) -> dict[str, float]:
    """Seconds of each phase of one step.

    The refresh of PaCA's columns, which a training step does at the start of its next forward pass, is done right after
    the optimizer instead, so that it has a time of its own. Waiting for the device between the phases makes the sum
    larger than a step that is not split.
    """
    layers = paca_layers(step.model)
    start = clock(step.device)
    result = step.forward()
    forward = clock(step.device)
    step.backward(result)
    backward = clock(step.device)
    step.update()
    update = clock(step.device)
    write_layers(layers)
    times = (start, forward, backward, update, clock(step.device))
    return {name: times[i + 1] - times[i] for i, name in enumerate(PHASES)}


def profile_step(step: TrainingStep, rank: int, repeats: int = 3) -> dict[str, float]:
    """Seconds per step and kind of work, from torch.profiler.

    On a CPU the kinds add up to the step as it ran under the profiler (which makes it slower); `Python and autograd` is
    what no operator accounts for. On CUDA they are the kernels' times; `idle` is the rest of the step.

    Args:
        step: an eager step, warmed up.
        rank: a matrix product with a dimension of this size is a skinny one.
        repeats: steps to average over.
    """
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    layers = paca_layers(step.model)
    with profile(activities=activities, record_shapes=True) as profiler:
        start = clock(step.device)
        for _ in range(repeats):
            step.backward(step.forward())
            with record_function(_RANGE + "optimizer"):
                step.update()
            with record_function(_RANGE + "refresh"):
                write_layers(layers)
        seconds = (clock(step.device) - start) / repeats
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = _kind(event, rank)
        if kind is not None and microseconds > 0:
            found[kind] += microseconds / 1e6 / repeats
    rest = "idle" if cuda else "Python and autograd"
    found[rest] = max(0.0, seconds - sum(found.values()))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kind(event: Any, rank: int) -> str | None:
    """What the event's own time was spent on; None for what isn't an operator."""
    if str(event.device_type).endswith("CUDA"):
        return None  # a kernel: counted with the operator that launched it
    name: str = event.name
    if "::" not in name or name.startswith(("autograd::", _RANGE)):
        return None
    ancestor, takes_columns = event.cpu_parent, False
    while ancestor is not None:
        if ancestor.name.startswith(_RANGE):
            return str(ancestor.name.removeprefix(_RANGE))
        takes_columns |= ancestor.name == _FORWARD and name in _COPIES_OF_COLUMNS
        ancestor = ancestor.cpu_parent
    if takes_columns:
        return "gather"
    if name in _MATMULS:
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        return "skinny GEMM" if rank in sizes else "GEMM"
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "attention"
    if name.startswith(_CONVOLUTIONS):
        return "convolution"
    if name in _GATHERS:
        return "gather"
    if name in _CASTS:
        return "copies and casts"
    return "elementwise, norms, reductions"

"""What will be trained, as a table: printed before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from paca.comparison.equal import CameOut
from paca.comparison.methods import Method
from paca.comparison.results import few_examples_text, few_steps_text
from paca.messages.units import format_bytes, format_duration
from paca.training.plan import Plan


@dataclass(frozen=True)
class PlannedMethod:
    """A method and what its runs will be."""

    came_out: CameOut
    plan: Plan

    @property
    def method(self) -> Method:
        """The method, made equal."""
        return self.came_out.method


def table_of(planned: Sequence[PlannedMethod]) -> Table:
    """One row for each method; the first is what the others are compared with."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    leader = planned[0]
    measured = [one.came_out.measured for one in planned]
    columns = {
        "method": [one.method.name for one in planned],
        "settings": [settings_text(one.method) for one in planned],
        "trained": [_compared(one.plan.trainable_parameters, leader.plan.trainable_parameters) for one in planned],
        "steps": ["?" if one.plan.steps is None else f"{one.plan.steps:,}" for one in planned],
        "examples a step": [_sequences(one.plan) for one in planned],
    }
    if any("step_seconds" in one for one in measured):
        columns["seconds a step (× in turn)"] = [
            f"{one['step_seconds']:.3g} ({one['step_ratio']:.2f} ×)" if one else "" for one in measured
        ]
    if any("peak" in one for one in measured):
        columns["peak memory"] = [format_bytes(one["peak"]) if "peak" in one else "" for one in measured]
    if any(one.came_out.note for one in planned):
        columns["note"] = [one.came_out.note for one in planned]
    for name in columns:
        table.add_column(name)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def no_verdict_text(planned: Sequence[PlannedMethod], seeds: int) -> list[str]:
    """Why the comparison can't end with a verdict, or with one that tells little, where that is known beforehand."""
    if len(planned) == 1:  # it stays a search for a method's best rate
        return [
            f"There is one method, {planned[0].method.name}, and nothing to compare it with: what comes out is its "
            "best rate and its score. Name another one in --methods for a verdict."
        ]
    told = []
    if seeds == 1:
        told.append("One seed shows no difference, as chance is seen between seeds: name three, such as --seeds 0,1,2.")
    steps = [one.plan.steps for one in planned if one.plan.steps is not None]
    if len(steps) == len(planned):
        told += few_steps_text(max(steps))
    return told + few_examples_text(_eval_examples(planned))


def data_text(planned: Sequence[PlannedMethod]) -> str:
    """What is trained on, and how many examples the methods are judged by, on one line."""
    counts = " or ".join(f"{count:,}" for count in _eval_examples(planned))
    return f"data: {planned[0].plan.data.train.description}; held out: {counts}"


def _eval_examples(planned: Sequence[PlannedMethod]) -> list[int]:
    return sorted({count for one in planned if (count := one.plan.eval_examples) is not None})


def rates_text(grids: Mapping[str, Sequence[float]], *, extend: bool) -> str:
    """The rates that each method begins with, on one line; those that all have are told once."""
    shown = {name: ", ".join(f"{rate:g}" for rate in grid) for name, grid in grids.items()}
    if len(set(shown.values())) == 1:
        text = next(iter(shown.values()))
    else:
        text = "; ".join(f"of {name} {rates}" for name, rates in shown.items())
    return f"rates {text}{' and beyond while the edge is best' if _grows(grids, extend) else ''}"


def _grows(grids: Mapping[str, Sequence[float]], extend: bool) -> bool:
    return extend and any(len(grid) > 1 for grid in grids.values())


def work_text(
    planned: Sequence[PlannedMethod], grids: Mapping[str, Sequence[float]], seeds: int, *, extend: bool
) -> str:
    """How many runs there will be, each rate with the first seed and the best with the others; how long, if known."""
    runs = {one.method.name: len(grids[one.method.name]) + seeds - 1 for one in planned}
    steps = [one.plan.steps * runs[one.method.name] for one in planned if one.plan.steps is not None]
    count = sum(runs.values())
    told = [f"{'at least ' if _grows(grids, extend) else ''}{count:,} run{'s' * (count != 1)}"]
    if len(steps) == len(planned):
        told.append(f"{sum(steps):,} steps in all")
        measured = [one.came_out.measured for one in planned]
        if all("step_seconds" in one for one in measured):
            seconds = sum(count * one["step_seconds"] for count, one in zip(steps, measured, strict=True))
            told.append(f"about {format_duration(seconds)} of training by the steps just timed, without evaluations")
    if _grows(grids, extend):
        told.append("more where a best rate is at an end of its grid (--no-extend: none)")
    return ", ".join(told)


def disk_text(planned: Sequence[PlannedMethod], grids: Mapping[str, Sequence[float]], seeds: int) -> str:
    """What the runs leave on the disk, and what one of them takes besides while it goes."""
    runs = {one.method.name: len(grids[one.method.name]) + seeds - 1 for one in planned}
    left = sum(runs[one.method.name] * (one.plan.disk.result + one.plan.disk.start) for one in planned)
    left += max(one.plan.disk.base for one in planned)  # unpacked once: the runs' files are one
    going = max(one.plan.disk.checkpoints * one.plan.disk.checkpoint for one in planned)
    besides = f", and up to {format_bytes(going)} of checkpoints while a run goes" if going else ""
    return f"disk space: about {format_bytes(left)}{besides}"


def settings_text(method: Method) -> str:
    """The settings of a method on one line; what is null or empty is left out."""
    shown: dict[str, Any] = dict(method.settings)
    for section in ("train", "model"):
        values: Mapping[str, Any] = method.sections.get(section, {})
        shown |= {name: value for name, value in values.items() if name not in _IN_OTHER_COLUMNS}
    given = {name: value for name, value in shown.items() if value not in (None, [], {}, "")}
    parts = [f"{name} {_value(value, of_layers=name.endswith('_pattern'))}" for name, value in given.items()]
    return ", ".join(parts) or "defaults"


_IN_OTHER_COLUMNS = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")


def _value(value: Any, *, of_layers: bool = False) -> str:
    if isinstance(value, Mapping) and of_layers:  # maybe many: each row of runs.jsonl has it whole
        return f"for {len(value)} name{'s' * (len(value) != 1)}"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name} {_value(one)}' for name, one in value.items())})"
    if isinstance(value, list):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _compared(count: int, leader: int) -> str:
    return f"{count:,}" if count == leader else f"{count:,} ({count / leader:.3g} ×)"


def _sequences(plan: Plan) -> str:
    train = plan.config.train
    batch, accumulation = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    return f"{plan.sequences_per_step} ({batch} × {accumulation})" if accumulation > 1 else str(plan.sequences_per_step)

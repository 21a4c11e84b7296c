"""What is made the same for all methods: trainable parameters, wall-clock time, or memory. The first method leads."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paca.comparison.methods import Method, Sections
from paca.comparison.trial import Trial, TrialFailed, Try
from paca.messages.errors import PacaError
from paca.messages.units import format_bytes, format_duration

ROUNDS = 3
"""Of timing; in each, every method takes its turn, and the order rotates."""
TIMED_STEPS = 10
TRIALS_ON_A_LINE = 8  # of r at equal memory; what goes on jumps, and is halved
MEMORY_STEPS = 2  # the optimizer's state exists from the first step on

Announce = Callable[[str], None]


@dataclass
class CameOut:
    """A method after it was made equal."""

    method: Method
    measured: dict[str, Any] = field(default_factory=dict)
    """What was measured on the way, for the table and for whoever comes later."""
    note: str = ""
    """What could not be made equal."""
    rates: list[float] | None = None
    """Those that `--lr auto` begins with."""


def same_parameters(methods: Sequence[Method], count: Callable[[Method], int]) -> list[CameOut]:
    """Choose each method's `r`, so that it trains as many parameters as the first one, as near as can be.

    Args:
        methods: The first one leads.
        count: Trainable parameters of a method.
    """
    leader, *others = methods
    wanted = count(leader)
    return [CameOut(leader), *(_with_parameters(method, wanted, count) for method in others)]


def _with_parameters(method: Method, wanted: int, count: Callable[[Method], int]) -> CameOut:
    r = method.rank
    if r is None:
        return CameOut(method, note="has no r to choose")
    # Most methods' parameters are linear in their r; two points give the line.
    other = r // 2 or 2
    here, there = count(method), count(method.with_rank(other))
    if here == there:
        return _nearest_of_some(method, wanted, {r: here, other: there}, count)
    nearest = max(1, round(r + (wanted - here) * (other - r) / (there - here)))
    if _has_rank(method, nearest, count):
        found = count(method.with_rank(nearest))
        if abs(found - wanted) <= abs((there - here) / (other - r)):
            return CameOut(method.with_rank(nearest))
        return _nearest_of_some(method, wanted, {r: here, other: there, nearest: found}, count)
    low, high = r, nearest  # a rank that its layers don't have
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _has_rank(method, middle, count) else (low, middle)
    return CameOut(method.with_rank(low), note=f"can train no more than r {low}, and would need r {nearest}")


def _nearest_of_some(method: Method, wanted: int, known: dict[int, int], count: Callable[[Method], int]) -> CameOut:
    """The nearest of some ranks, for a method whose parameters are not linear in it (LoKr's, RandLoRA's), and how far
    it is from what is wanted."""
    counts: dict[int, int | None] = dict(known)

    def look(r: int) -> None:
        try:
            counts[r] = count(method.with_rank(r))
        except PacaError:  # a rank that its layers don't have
            counts[r] = None

    for r in {2**power for power in range(11)} - counts.keys():
        look(r)
    while True:  # in the middle of the nearest on both sides
        above = [(found, r) for r, found in counts.items() if found is not None and found >= wanted]
        below = [(found, r) for r, found in counts.items() if found is not None and found < wanted]
        if not above or not below or (middle := (min(above)[1] + max(below)[1]) // 2) in counts:
            break
        look(middle)
    if len({found for found, _ in above + below}) == 1:
        return CameOut(method, note="its parameters don't follow its r")
    found, r = min(above + below, key=lambda one: (abs(one[0] - wanted), one[1]))
    share = found / wanted
    note = (
        "" if 0.9 < share < 1.1 else f"no r that was tried comes nearer than r {r}, with {share:.2g} × the parameters"
    )
    return CameOut(method.with_rank(r), note=note)


def _has_rank(method: Method, r: int, count: Callable[[Method], int]) -> bool:
    if r <= (method.rank or 0):
        return True
    try:
        count(method.with_rank(r))
    except PacaError:
        return False
    return True


_STEPS_OF_SCHEDULES = ("num_decay_steps", "num_stable_steps", "timescale")
"""What counts steps among the arguments of transformers' schedules."""


def same_time(
    methods: Sequence[Method], steps: int, common: Sections, attempt: Try, announce: Announce
) -> list[CameOut]:
    """Choose each method's steps, so that its training takes as long as the first one's.

    Settings that count steps (the warm-up, those of `lr_scheduler_kwargs`, PaCA's rotation) become more or fewer in the
    same ratio.

    Step times are measured in rounds in which the methods take turns, on the same batches. Ratios to the first method
    are taken round by round, so that a machine that drifts drifts for all.

    Args:
        methods: The first one leads.
        steps: How many the first one makes.
        common: The sections that all methods share.
        attempt: Makes trials.
        announce: Shows people a line.

    Raises:
        PacaError: A method can't make a step.
    """
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    began, done, left = time.monotonic(), 0, ""
    for number in range(ROUNDS):
        turn = number % len(methods)
        for method in [*methods[turn:], *methods[:turn]]:
            announce(f"Timing steps, round {number + 1} of {ROUNDS}: {method.name}{left} ...")
            seconds[method.name].append(_must(method, attempt, TIMED_STEPS).seconds / TIMED_STEPS)
            done += 1
            each = (time.monotonic() - began) / done
            left = f", about {format_duration(each * (ROUNDS * len(methods) - done))} left of the timing"
    leader = seconds[methods[0].name]
    came_out = []
    for method in methods:
        ratios = [one / other for one, other in zip(seconds[method.name], leader, strict=True)]
        ratio = statistics.median(ratios)
        measured: dict[str, Any] = {
            "step_seconds": statistics.median(seconds[method.name]),
            "step_ratio": ratio,
            "ratios": ratios,
        }
        if method is not methods[0]:
            own = max(1, round(steps / ratio))
            method, measured["scaled"] = _scaled(method, common, own / steps)
            method = method.with_settings("train", max_steps=own)
        came_out.append(CameOut(method, measured))
    return came_out


def _scaled(method: Method, common: Sections, times: float) -> tuple[Method, dict[str, int]]:
    """The method with its settings that count steps as so many times as large, and those; shares of 1 stay."""
    train = {**common.get("train", {}), **method.sections.get("train", {})}
    scaled: dict[str, int] = {}
    for section, name, value in (
        ("train", "warmup_steps", train.get("warmup_steps")),
        (method.kind, "rotate_every", method.settings.get("rotate_every")),
    ):
        if value is not None and value >= 1 and (now := max(1, round(value * times))) != value:
            method = method.with_settings(section, **{name: now})
            scaled[name] = now
    schedule = train.get("lr_scheduler_kwargs")
    if isinstance(schedule, str) and schedule.lstrip().startswith("{"):  # else a file's name
        schedule = json.loads(schedule)
    if isinstance(schedule, dict):
        counted = {name: value for name, value in schedule.items() if name in _STEPS_OF_SCHEDULES and value}
        longer = {name: now for name, value in counted.items() if (now := max(1, round(value * times))) != value}
        if longer:
            method = method.with_settings("train", lr_scheduler_kwargs={**schedule, **longer})
            scaled |= longer
    return method, scaled


def same_memory(
    methods: Sequence[Method],
    batch: int,
    accumulation: int,
    count: Callable[[Method], int],
    attempt: Try,
    announce: Announce,
) -> list[CameOut]:
    """Choose each method's batch and `r`, so that it needs as much memory as the first one, and no more.

    The weights are the same, so equal peaks are equal bytes above them. First comes the batch: the method's own, the
    first one's where it names none, or the largest part of it that fits, with more accumulation in turn, so that a step
    sees as many sequences. Then the largest `r` that fits.

    Args:
        methods: The first one leads.
        batch: Sequences that it has in memory at a time.
        accumulation: How many such batches it takes for a step.
        count: Trainable parameters of a method; raises `PacaError` for a rank that its layers don't have.
        attempt: Makes trials.
        announce: Shows people a line.

    Raises:
        PacaError: The first method can't make a step, or another one can't for other reasons than memory.
    """
    leader, *others = methods
    announce(f"Measuring memory: {leader.name} ...")
    budget = _must(leader, attempt, MEMORY_STEPS).peak

    def peak_of(given: Method, r: int | None) -> int | None:
        method = given if r is None else given.with_rank(r)
        announce(f"Measuring memory: {method.name}, {_sizes(method)} ...")
        try:
            return attempt(method, MEMORY_STEPS).peak
        except TrialFailed as error:
            if error.out_of_memory:
                announce(f"This counts as too large, as it ended in: {error}")
            if error.out_of_memory or not _has_rank(given, r or 0, count):
                return None
            raise _no_step(method, error) from error

    came_out = [CameOut(leader, {"peak": budget})]
    for method in others:
        came_out.append(_within_memory(method, batch, accumulation, peak_of, budget))
    return came_out


def _within_memory(
    method: Method, batch: int, accumulation: int, peak_of: Callable[[Method, int | None], int | None], budget: int
) -> CameOut:
    own = method.sections.get("train", {})
    batch = own.get("per_device_train_batch_size", batch)
    accumulation = own.get("gradient_accumulation_steps", accumulation)
    for part in (part for part in range(batch, 0, -1) if batch % part == 0):
        fits = method.with_settings(
            "train", per_device_train_batch_size=part, gradient_accumulation_steps=accumulation * batch // part
        )
        peak = peak_of(fits, None)
        if peak is not None and peak <= budget:
            break
    else:
        return CameOut(method, note=f"does not fit {format_bytes(budget)} with one sequence at a time")
    r = fits.rank
    if r is None:
        return CameOut(fits, {"peak": peak}, "has no r to choose")
    low, low_peak, high = r, peak, None
    measured = [(r, peak)]
    while high is None or high - low > max(1, low // 16):  # to 6 %: finer than two measurements agree
        line = _where_line_meets(budget, measured) if len(measured) < TRIALS_ON_A_LINE else None
        if line is not None and (high is None or line < high):
            middle = min(max(line, low + max(1, low // 16)), 8 * low)
        else:
            middle = 2 * low if high is None else (low + high) // 2
        peak = peak_of(fits, middle)
        if peak is not None:
            measured.append((middle, peak))
        if peak is None or peak > budget:
            high = middle
        else:
            low, low_peak = middle, peak
    return CameOut(fits.with_rank(low), {"peak": low_peak})


def _where_line_meets(budget: int, measured: Sequence[tuple[int, int]]) -> int | None:
    """The `r` that takes `budget`, by the last two of pairs of `r` and bytes; None without two, or if they don't rise.
    Most of what a method takes is linear in its `r`."""
    if len(measured) < 2:
        return None
    (r, peak), (other, at_other) = measured[-2:]
    if (other - r) * (at_other - peak) <= 0:
        return None
    return r + (budget - peak) * (other - r) // (at_other - peak)


def _must(method: Method, attempt: Try, steps: int) -> Trial:
    try:
        return attempt(method, steps)
    except TrialFailed as error:
        raise _no_step(method, error) from error


def _no_step(method: Method, error: TrialFailed) -> PacaError:
    return PacaError(f"{method.name} can't make a step: {error}")


def _sizes(method: Method) -> str:
    r = method.settings.get("r")
    batch = method.sections.get("train", {}).get("per_device_train_batch_size")
    return ", ".join(filter(None, (r and f"r {r}", batch and f"batch {batch}")))

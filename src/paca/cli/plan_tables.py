"""What `paca plan` prints: tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from paca.messages.program import program
from paca.messages.say import say
from paca.messages.units import format_bytes, format_duration

if TYPE_CHECKING:
    from paca.planning import Fit, Setting
    from paca.planning.device_rates import MatmulRate
    from paca.planning.methods import Planned
    from paca.planning.on_device import OnDevice
    from paca.planning.outcome import Outcome
    from paca.planning.target import Target

CLOSE = 0.1
"""Share of a budget that should stay free: planned largest batches were up to 7 % too large (docs/notes/plan-on.md)."""


def show_estimate(console: Console, outcome: Outcome) -> None:
    target, result, budget = outcome.target, outcome.result, outcome.budget
    setting = result.setting
    say(
        console,
        f"{target.name}: {result.parameters:,} parameters, {result.trainable:,} trained "
        f"({100 * result.trainable / result.parameters:.2f} %), weights in {result.weights}",
    )
    passes = setting.gradient_accumulation
    say(
        console,
        f"{_batch(target, setting)} per pass, {passes} pass{'es' if passes > 1 else ''} per step, on {setting.device}; "
        f"to save memory: {setting.techniques()}",
    )
    if setting.answers:
        assert setting.answering is not None
        made = f"{setting.answers} answers of up to {setting.answering.length} tokens"
        say(console, f"{made} are made at a time. Times are those of learning from them, all of that length, alone.")
    if target.warning is not None:
        say(console, f"Warning: {target.warning}", style="yellow")
    elif target.lengths is not None:
        say(console, f"The length is that of {target.lengths}.")
    if target.before is not None:
        say(console, target.before)
    if target.positions is not None and setting.sequence_length > target.positions:
        console.print(f"The model was made for sequences of at most {target.positions} tokens.", style="yellow")
    from paca.planning.methods import method_name

    method = method_name(target.adapter, setting)
    table = Table(title=f"Peak memory of {method},\nreached in: {result.moment}", title_justify="left")
    table.add_column("part")
    table.add_column("memory", justify="right")
    for name, count in result.parts.items():
        table.add_row(name, format_bytes(count))
    table.add_section()
    table.add_row("total", format_bytes(result.total))
    if budget is not None:
        free = outcome.found is None and outcome.simulated is None
        table.add_row("budget (free on this machine)" if free else "budget", format_bytes(budget))
    console.print(table)
    say(console, f"Kept from the forward pass for the backward pass: {format_bytes(result.activations)}.")
    if setting.device == "cpu":
        kept = "The process's peak may be up to about a tenth above the total, as malloc keeps what is freed."
        say(console, kept)
    from paca.planning.memory_estimate import PROGRAMS

    if PROGRAMS in result.parts:
        told = "Compiled products are kept for each shape, so a run gets there after batches of many lengths."
        say(console, f"{told} ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 LRU_CACHE_CAPACITY=64 keep fewer, and compile again.")
    if outcome.simulated is None:
        say(console, f"Time floor: {_time(outcome)}")
        if target.steps is not None and (seconds := outcome.seconds()) is not None:
            steps = "One step is all of the run, and takes" if target.steps == 1 else f"Its {target.steps:,} steps take"
            whole = f"{steps} at least {format_duration(target.steps * seconds)}"
            told = f"`{program()} train` tells the time left from its first step on."
            say(console, f"{whole}, without evaluations; {told}")
    if outcome.rate is not None and outcome.rate.load is not None:
        load = f"load {outcome.rate.load:.1f} on {os.cpu_count()} cores"
        say(console, f"The machine was busy in the last minute ({load}): times are of what it left.")
    if outcome.simulated is not None:
        device = outcome.simulated.device
        usable, memory = format_bytes(device.usable), format_bytes(device.memory)
        say(console, f"Programs get {usable} of the device's {memory} ({device.usable_source}).")
    if budget is None or result.total < (1 - CLOSE) * budget:
        return
    if result.total > budget:
        console.print("This does not fit. Give --memory to find what does.", style="red")
    else:
        advice = "Leave 5 to 10 % of the budget free, as memory gets fragmented and this plan can be too low."
        say(console, advice, style="yellow")


def _batch(target: Target, setting: Setting) -> str:
    """What is in a pass, in words."""
    from paca.planning.setting import PAIRED

    if target.counts == "images":
        return f"{setting.batch_size} images"
    count = setting.batch_size
    counted = f"{count} pair{'s' if count > 1 else ''} of 2" if setting.trainer in PAIRED else str(count)
    return f"{counted} x {setting.sequence_length} tokens"


def _time(outcome: Outcome) -> str:
    result, rate, unpacking, seconds = outcome.typical, outcome.rate, outcome.unpacking, outcome.seconds()
    work = f"{result.flops / 1e12:,.2f} TFLOP per step"
    if result.dequantized:
        work += f" and {result.dequantized / 1e9:,.2f} GB to unpack weights"
    if rate is None or seconds is None:
        return f"{work}; the device is not here to be measured (give --rate)"
    speeds = f"{rate.at(result.setting.tokens_per_pass) / 1e12:,.3f} TFLOP/s, {rate.source}"
    if result.dequantized:
        speeds += (
            "; the unpacking is left out, as its speed is not known here (give --bandwidth)"
            if unpacking is None
            else f"; {unpacking.bytes_per_second / 1e9:,.1f} GB/s, {unpacking.source}"
        )
    typical = outcome.target.typical_length
    length = "" if typical is None else f" of sequences of {typical} tokens, as batches are padded to on average"
    most = f"{result.setting.tokens_per_step / seconds:,.0f} {outcome.target.counts}/s"
    return f"{seconds:,.3f} s per step{length}, at most {most} ({work} at {speeds})"


def show_fit(console: Console, found: Fit, rate: MatmulRate | None, target: Target) -> None:
    table = Table(title="What fits, fastest first", title_justify="left")
    for heading in ("to save memory", "batch", "accumulation", "memory", "s per step"):
        table.add_column(heading, justify="left" if heading == "to save memory" else "right")
    for candidate in found.candidates:
        setting = candidate.setting
        table.add_row(
            setting.techniques(),
            str(setting.batch_size),
            str(setting.gradient_accumulation),
            format_bytes(candidate.estimate.total),
            "does not fit" if not candidate.fits else "-" if rate is None else f"{candidate.seconds:,.3f}",
        )
    console.print(table)
    if found.weights_reason is not None:
        say(console, found.weights_reason)
    for reason in found.refused:
        say(console, f"Not considered: {reason}")
    for line in yaml_lines(found.setting, target):
        say(console, line)


def show_simulated(console: Console, simulated: OnDevice, steps: int, counts: str = "tokens") -> None:
    """The table of `--on`. It fits 80 columns."""
    from paca.planning.published_steps import errors_in_words

    device = simulated.device
    title = f"Simulated on {device.title}: nothing here was measured"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    unit, hours_of_one = _unit_of_time(max(row.hours(steps) for row in simulated.rows))
    for heading in ("memory", "ms per\nstep", f"{counts}/s", f"{unit} of\n{steps:,} steps", "launch-\nbound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in simulated.rows:
        total = row.estimate.total
        table.add_row(
            row.method,
            format_bytes(total) if total <= device.usable else f"{format_bytes(total)}\n(too much)",
            f"{1e3 * row.time.total:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.hours(steps) / hours_of_one:,.2f}",
            f"{100 * row.time.launch_bound:.0f} %",
        )
    console.print(table)
    _say_what_is_trained(console, simulated.rows, simulated.refused)
    for note in simulated.notes:
        console.print(note, style="yellow")
    waits = max(row.time.waits for row in simulated.rows)
    waited = f" The host waits for the device {waits} times within a step." if waits else ""
    say(
        console,
        f"Simulated from one traced step and the device's figures, entered from memory ({device.source}). Launch-bound "
        f"is the share of the step in which the device waits for the host.{waited} {errors_in_words(device)}",
    )


def show_methods(console: Console, outcome: Outcome) -> None:
    """The table of `--compare` for this machine, on which nothing is simulated."""
    table = Table(title="Peak memory of each method", title_justify="left")
    for heading in ("method", "memory", "kept for the\nbackward pass"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in outcome.methods:
        table.add_row(row.method, format_bytes(row.estimate.total), format_bytes(row.estimate.activations))
    console.print(table)
    _say_what_is_trained(console, outcome.methods, outcome.refused)
    say(console, f"`{program()} compare` measures their time, and what they learn.")


def _say_what_is_trained(console: Console, rows: Sequence[Planned], refused: Sequence[str]) -> None:
    trained: dict[str, list[str]] = {}
    for row in rows:
        trained.setdefault(row.adapter, []).append(row.method)
    for adapter, methods in trained.items():
        say(console, f"{', '.join(methods)}: {adapter}.")
    for reason in refused:
        say(console, f"Left out: {reason}")


def _unit_of_time(hours: float) -> tuple[str, float]:
    """The largest unit of which `hours` are one or more, and how many hours it has."""
    units = (("hours", 1.0), ("minutes", 1 / 60), ("seconds", 1 / 3600))
    return next((unit for unit in units if hours >= unit[1]), units[-1])


def yaml_lines(setting: Setting, target: Target) -> list[str]:
    """The lines that, in the YAML of the run `target` (or of one that sets none of it), ask for `setting`."""
    given = target.setting
    names = ("quantization", "lean", "recompute")
    model = {name: getattr(setting, name) for name in names if getattr(setting, name) or getattr(given, name)}
    of_data = target.counts == "images" or setting.answering is not None  # then its lengths are no setting
    train: dict[str, Any] = {} if of_data else {"max_length": setting.sequence_length}
    train["per_device_train_batch_size"] = setting.batch_size
    train["gradient_accumulation_steps"] = setting.gradient_accumulation
    if setting.checkpointing or given.checkpointing:
        train[target.checkpointing_key] = setting.checkpointing
    lines = ["In a run's YAML:"]
    for section, values in (("model", model), ("train", train)):
        lines += [f"  {section}:"] if values else []
        lines += [f"    {name}: {'null' if value is None else str(value).lower()}" for name, value in values.items()]
    return lines

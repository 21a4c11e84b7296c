"""`paca plan`: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.messages.units import format_bytes, parse_bytes
from paca_command import import_package

if TYPE_CHECKING:
    from paca.planning import Fit, MemoryEstimate, Setting
    from paca.planning.device_rates import DequantizeRate, MatmulRate
    from paca.planning.target import Target

QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class Outcome:
    """What was planned."""

    target: Target
    result: MemoryEstimate
    typical: MemoryEstimate
    """As `result`, for sequences of typical length: what a step takes in time."""
    rate: MatmulRate | None
    unpacking: DequantizeRate | None
    budget: int | None
    found: Fit | None

    def seconds(self) -> float | None:
        """Time floor of a step."""
        from paca.planning import step_seconds

        return None if self.rate is None else step_seconds(self.typical, self.rate, self.unpacking)


def plan(
    target: Annotated[
        str, typer.Argument(metavar="RUN.yaml|MODEL", help="A run, a hub id, a folder, or a preset of paca bench.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="A budget, such as 24GiB: find the fastest setting that fits.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in each sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one forward pass.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Sequences per optimizer step, for --memory.")] = None,
    r: Annotated[int, typer.Option(help="Trained columns per layer (a run's YAML has its own).")] = 16,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights (a run's YAML has its own).")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has when absent.")] = None,
    lean: Annotated[bool, typer.Option("--lean", help="With lean blocks.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="With lean blocks whose MLP is recomputed.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With activation checkpointing.")] = False,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="none, nf4, fp4 or int8. With --memory, auto (16 bits where they fit, else nf4) and any (the faster)."
        ),
    ] = None,
    padded: Annotated[bool, typer.Option("--padded", help="With an attention mask: padding or packing.")] = False,
    loss: Annotated[str, typer.Option(help="chunked (as paca train), full, or any (for --memory).")] = "chunked",
    rate: Annotated[float | None, typer.Option(help="TFLOP/s of the device, instead of measuring them.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of the device's memory, for unpacking quantized weights.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the run; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what training would take: memory by part, and the least time per step; with --memory, what would fit."""
    if loss not in ("chunked", "full", "any"):
        raise PacaError(f"--loss must be chunked, full or any, not {loss!r}.")
    if quantization not in (None, "none", *QUANTIZATIONS, *(() if memory is None else ("auto", "any"))):
        choice = "none, nf4, fp4, int8, or with --memory auto or any"
        raise PacaError(f"--quantization must be {choice}, not {quantization!r}.")
    budget = None if memory is None else parse_bytes(memory)
    import_package()
    import torch

    from paca.planning import available_memory, estimate, fit
    from paca.planning.device_rates import fixed_rate, given_bandwidth, measure_dequantize_rate, measure_rate

    planned = _target(target, seq, batch_size, r, dtype, device, set_ or [])
    setting = planned.setting
    if quantization is not None:
        setting = replace(setting, quantization=quantization if quantization in QUANTIZATIONS else None)
    setting = replace(
        setting,
        lean=setting.lean or lean or recompute,
        recompute="mlp" if recompute else setting.recompute,
        checkpointing=setting.checkpointing or checkpointing,
        padded=setting.padded or padded,
        chunked_loss=setting.chunked_loss and loss != "full",
    )
    # The ways to keep the weights that a search tries, the preferred one first; without a search, the only one.
    choose = memory is not None and quantization in (None, "auto", "any") and setting.quantization is None
    considered = (None, "nf4") if choose else (setting.quantization,)
    here = setting.device == "cpu" or torch.cuda.is_available()
    speed = planned.dtype, planned.hidden_size
    measured, unpacking, found = None, None, None
    if rate is not None:
        measured = fixed_rate(rate * 1e12)
    elif here:
        measured = measure_rate(setting.device, *speed)
    if bandwidth is not None:
        unpacking = given_bandwidth(bandwidth * 1e9)
    elif here and considered[-1] is not None:
        unpacking = measure_dequantize_rate(setting.device, *speed, considered[-1])
    if budget is not None:
        if global_batch is None:
            global_batch = setting.batch_size * setting.gradient_accumulation if _is_run(target) else 16
        found = fit(
            planned.model,
            setting,
            memory=budget,
            global_batch=global_batch,
            adapter=planned.adapter,
            rate=measured,
            dequantize=unpacking,
            any_loss=loss == "any",
            quantizations=considered,
            fastest_weights=quantization == "any",
        )
    else:
        with contextlib.suppress(PacaError):  # a plan for a GPU that is not here
            budget = available_memory(setting.device)
    result = estimate(planned.model, setting, planned.adapter) if found is None else found.best.estimate
    typical = result
    if planned.typical_length is not None:
        shorter = replace(result.setting, sequence_length=planned.typical_length)
        typical = estimate(planned.model, shorter, planned.adapter)
    outcome = Outcome(planned, result, typical, measured, unpacking, budget, found)
    if as_json:
        print(json.dumps(_as_json(outcome), indent=2))
        return
    console = Console()
    _show_estimate(console, outcome)
    if found is not None:
        _show_fit(console, found, measured)


def _target(
    name: str, seq: int | None, batch_size: int | None, r: int, dtype: str, device: str | None, overrides: list[str]
) -> Target:
    import torch

    from paca.planning import Setting
    from paca.planning.target import target_of_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if _is_run(name):
        from paca.training.planned_run import target_of_run

        return target_of_run(Path(name), overrides, device, seq, batch_size)
    if overrides:
        raise PacaError("--set changes a run's YAML; for a model use the options of `paca plan`.")
    setting = Setting(
        sequence_length=1024 if seq is None else seq,
        batch_size=1 if batch_size is None else batch_size,
        device=device,  # type: ignore[arg-type]
    )
    return target_of_model(name, dtype, r, setting)


def _is_run(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


def _show_estimate(console: Console, outcome: Outcome) -> None:
    target, result, budget = outcome.target, outcome.result, outcome.budget
    setting = result.setting
    say(
        console,
        f"{target.name}: {result.parameters:,} parameters, {result.trainable:,} trained "
        f"({100 * result.trainable / result.parameters:.2f} %), weights in {result.weights}",
    )
    say(
        console,
        f"{setting.batch_size} x {setting.sequence_length} tokens per pass, {setting.gradient_accumulation} passes per "
        f"step, on {setting.device}; to save memory: {setting.techniques()}",
    )
    if target.lengths is not None:
        say(console, f"The length is that of {target.lengths}.")
    if target.positions is not None and setting.sequence_length > target.positions:
        console.print(f"The model was made for sequences of at most {target.positions} tokens.", style="yellow")
    table = Table(title=f"Peak memory ({result.moment})", title_justify="left")
    table.add_column("part")
    table.add_column("memory", justify="right")
    for name, count in result.parts.items():
        table.add_row(name, format_bytes(count))
    table.add_section()
    table.add_row("total", format_bytes(result.total))
    if budget is not None:
        table.add_row("budget", format_bytes(budget))
    console.print(table)
    say(console, f"The autograd graph holds {format_bytes(result.activations)} at the end of the forward pass.")
    say(console, f"Time floor: {_time(outcome)}")
    if budget is not None and result.total > budget:
        console.print("This does not fit. Give --memory to find what does.", style="red")


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
    return (
        f"{seconds:,.3f} s per step{length}, at most {result.setting.tokens_per_step / seconds:,.0f} tokens/s "
        f"({work} at {speeds})"
    )


def _show_fit(console: Console, found: Fit, rate: MatmulRate | None) -> None:
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
    for line in yaml_lines(found.setting):
        say(console, line)


def yaml_lines(setting: Setting) -> list[str]:
    """The lines of a run's YAML that ask for `setting`."""
    lines = ["In a run's YAML:"]
    if setting.lean or setting.quantization:
        lines += ["  model:"]
        lines += [f"    quantization: {setting.quantization}"] if setting.quantization else []
        lines += ["    lean: true"] if setting.lean else []
        lines += ["    recompute: mlp"] if setting.recompute else []
    lines += [
        "  train:",
        f"    max_length: {setting.sequence_length}",
        f"    per_device_train_batch_size: {setting.batch_size}",
        f"    gradient_accumulation_steps: {setting.gradient_accumulation}",
    ]
    return [*lines, "    gradient_checkpointing: true"] if setting.checkpointing else lines


def _as_json(outcome: Outcome) -> dict[str, Any]:
    result, rate, found = outcome.result, outcome.rate, outcome.found
    content: dict[str, Any] = {
        "target": outcome.target.name,
        "parameters": result.parameters,
        "trainable": result.trainable,
        "weights": result.weights,
        "lengths": outcome.target.lengths,
        "setting": result.setting.as_dict(),
        "memory": {**result.parts},
        "total": result.total,
        "peak_moment": result.moment,
        "budget": outcome.budget,
        "saved_activations": {**result.saved},
        "typical_sequence_length": outcome.target.typical_length,
        "flops_per_step": outcome.typical.flops,
        "bytes_to_unpack_weights_per_step": outcome.typical.dequantized,
        "unpacking": outcome.unpacking and dataclasses.asdict(outcome.unpacking),
        "rate": rate and {"flops_per_second": {**rate.measured}, "source": rate.source},
        "seconds_per_step": outcome.seconds(),
    }
    if found is not None:
        content |= {"weights_reason": found.weights_reason, "not_considered": [*found.refused]}
        content["candidates"] = [
            {
                "setting": each.setting.as_dict(),
                "total": each.estimate.total,
                "fits": each.fits,
                "seconds_per_step": rate and each.seconds,
            }
            for each in found.candidates
        ]
    return content

"""`paca plan`: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paca.cli.starting import import_libraries
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.messages.say import console_for_tables
from paca.messages.units import parse_bytes

if TYPE_CHECKING:
    from paca.planning.target import Target

LOSSES = ("chunked", "full", "any")
QUANTIZATIONS = ("nf4", "fp4", "int8")


def plan(
    target: Annotated[
        str, typer.Argument(metavar="RUN.yaml|MODEL", help="A run, a hub id, a folder, or a preset of `paca bench`.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="A budget, such as 24GiB. Finds the fastest setting that fits.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in each sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in one forward pass.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="With --memory: sequences in one optimizer step.")] = None,
    r: Annotated[
        int | None, typer.Option(help="Trained columns per layer. A run's YAML has its own.", show_default="64")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights. A run's YAML has its own.", show_default="auto")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Plan for cpu or cuda. It need not be here.", show_default="what this machine has"),
    ] = None,
    lean: Annotated[
        bool, typer.Option("--lean", help="Plan with lean blocks, which keep less for the backward pass.")
    ] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Plan with lean blocks and recomputed MLPs.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Plan with activation checkpointing.")] = False,
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Weights: none, nf4, fp4 or int8. With --memory also auto (16 bits if they fit) and any (the faster)."
        ),
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Batches hold padding or packed examples: attention gets a mask.")
    ] = False,
    loss: Annotated[
        str, typer.Option(help="Loss: chunked (as in `paca train`) or full. With --memory also any.")
    ] = "chunked",
    rate: Annotated[
        float | None, typer.Option(help="Speed of the device, in TFLOP/s.", show_default="measured")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Memory bandwidth in GB/s, for unpacking quantized weights.", show_default="measured"),
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Simulate a GPU that is not here, such as h100.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="lora: also show LoRA (default and tuned), QPaCA and QLoRA.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="With --on: optimizer steps.", show_default="the run's, else 1,000")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the YAML. May be repeated."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Estimate the memory and the least time of a training, before anything is loaded."""
    _check_simulation(on, compare, steps, device, rate, bandwidth)
    if loss not in LOSSES:
        raise PacaError(f"--loss must be chunked, full or any, not {loss!r}.{did_you_mean(loss, LOSSES, '{}')}")
    ways = ("none", *QUANTIZATIONS, *(() if memory is None else ("auto", "any")))
    if quantization is not None and quantization not in ways:
        choice, meant = "none, nf4, fp4, int8, or with --memory auto or any", did_you_mean(quantization, ways, "{}")
        raise PacaError(f"--quantization must be {choice}, not {quantization!r}.{meant}")
    _check_search(memory, global_batch, loss)
    if _is_run(target):
        _refuse_options_of_models(target, r, dtype)
    budget = None if memory is None else parse_bytes(memory)
    from paca.planning.devices import find_device

    simulated = None if on is None else find_device(on)
    import_libraries()
    import torch

    from paca.cli.plan_json import as_json
    from paca.cli.plan_tables import show_estimate, show_fit, show_methods, show_simulated
    from paca.planning import outcome

    device = "cuda" if simulated is not None else device
    planned = _target(target, seq, batch_size, r, dtype, device, set_ or [])
    lacks_it = simulated is not None and not simulated.has_bfloat16 and planned.dtype == torch.bfloat16
    if lacks_it and dtype in (None, "auto") and not _is_run(target):
        planned = _target(target, seq, batch_size, r, "float16", device, set_ or [])
    if global_batch is None:
        size = planned.setting.batch_size
        global_batch = planned.setting.sequences_per_step if _is_run(target) else size * max(1, 16 // size)
    wanted = outcome.Wanted(
        memory=budget,
        global_batch=global_batch,
        lean=lean,
        recompute=recompute,
        checkpointing=checkpointing,
        padded=padded,
        batch_size=batch_size,
        quantization=quantization,
        loss=loss,
        rate=None if rate is None else rate * 1e12,
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        on=simulated,
        compare=compare is not None,
        steps=steps,
    )
    result = outcome.plan(planned, wanted)
    if json_:
        print(json.dumps(as_json(result), indent=2))
        return
    console = console_for_tables()
    show_estimate(console, result)
    if result.found is not None:
        show_fit(console, result.found, result.rate, planned)
    if result.simulated is not None:
        show_simulated(console, result.simulated, result.steps, planned.counts)
    if result.methods:
        show_methods(console, result)


def _check_search(memory: str | None, global_batch: int | None, loss: str) -> None:
    """What only a search for a setting that fits uses."""
    given = [*(["--global-batch"] if global_batch is not None else []), *(["--loss any"] if loss == "any" else [])]
    if memory is None and given:
        raise PacaError(
            f"{' and '.join(given)} would change nothing without a budget to search within. Give --memory 24GiB, for "
            "example. Without one, --batch-size and a run's train.gradient_accumulation_steps say what is planned."
        )


def _refuse_options_of_models(run: str, r: int | None, dtype: str | None) -> None:
    instead = {} if r is None else {"--r": f"--set paca.r={r} (or the r of its own method)"}
    instead |= {} if dtype is None else {"--dtype": f"--set model.dtype={dtype}"}
    if instead:
        raise PacaError(
            f"{' and '.join(instead)} would change nothing, as {run} is a run, whose YAML has its own. Give "
            f"{' and '.join(instead.values())} instead."
        )


def _check_simulation(
    on: str | None,
    compare: str | None,
    steps: int | None,
    device: str | None,
    rate: float | None,
    bandwidth: float | None,
) -> None:
    if compare not in (None, "lora"):
        raise PacaError(f"--compare must be lora, not {compare!r}.")
    if steps is not None and steps < 1:
        raise PacaError(f"--steps is {steps}; it must be 1 or more.")
    if on is None and steps is not None:
        instead = "" if (rate, bandwidth) == (None, None) else " --rate and --bandwidth can't stand in for one."
        raise PacaError(f"--steps is for a simulated device. Name it: --on h100, for example.{instead}")
    if on is not None and (rate is not None or bandwidth is not None or device not in (None, "cuda")):
        raise PacaError("--on brings the rates of its device along. Leave out --rate, --bandwidth and --device.")
    if device not in (None, "cpu", "cuda"):
        such = "gaudi2" if device == "hpu" else "mi300x" if device in ("hip", "rocm") else "h100"
        raise PacaError(
            f"--device is cpu or cuda, not {device!r}. For a GPU or an accelerator that is not here leave it out, and "
            f"name one of the table: --on {such}, for example."
        )


def _target(
    name: str,
    seq: int | None,
    batch_size: int | None,
    r: int | None,
    dtype: str | None,
    device: str | None,
    overrides: list[str],
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
    return target_of_model(name, dtype or "auto", 64 if r is None else r, setting)


def _is_run(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")

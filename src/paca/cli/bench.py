"""`paca bench`: measure methods against each other, and show what was measured."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paca.cli.starting import import_libraries
from paca.cli.switches import Command, Group
from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.messages.units import parse_bytes

bench = typer.Typer(
    help="Measure methods against each other: step time, memory, longest sequence, largest batch.",
    cls=Group,
    invoke_without_command=True,
    no_args_is_help=False,
)

_Names = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,…",
        help="Methods, or all. `paca bench methods` lists them.",
        show_default="frozen, paca, lora and variants",
    ),
]


@bench.callback()
def run(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A preset (random weights), a folder, a GGUF file or a hub id.")] = (
        "llama3-8b"
    ),
    layers: Annotated[int | None, typer.Option(help="Shrink a preset to this many blocks.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Shrink a preset to this width. Heads and MLP follow.")] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="Width of the MLP.", show_default="follows from the width")
    ] = None,
    vocab: Annotated[int | None, typer.Option(help="Shrink a preset's vocabulary.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, for vision presets.")] = None,
    scope: Annotated[str, typer.Option(help="What to run: model (with its loss) or blocks (alone).")] = "model",
    loss: Annotated[
        str, typer.Option(help="Loss: logits (the model's own) or fused (TRL's, as in paca train).")
    ] = "logits",
    dtype: Annotated[str, typer.Option(help="Type of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, …")] = "auto",
    methods: _Names = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The method that ratios are taken against.", show_default="frozen, else the first"),
    ] = None,
    seq: Annotated[str, typer.Option("--seq", "--tokens", metavar="N,N,…", help="Sequence lengths.")] = "512",
    batch: Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes.")] = "1",
    rank: Annotated[int, typer.Option(help="Rank r of PaCA and LoRA.")] = 16,
    measure: Annotated[
        str,
        typer.Option(
            metavar="A,B,…", help="What to measure: time, memory, saved, switch, launches, max-seq, max-batch."
        ),
    ] = "time,saved,memory",
    rounds: Annotated[int, typer.Option(help="Rounds; each times every method once.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps per method before the rounds.")] = 2,
    memory: Annotated[str | None, typer.Option(help="Budget of max-seq and max-batch, such as 2GiB.")] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Also measure compiled models.")] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Also measure models compiled into CUDA graphs.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also split the step by phase and kind of work.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batch.")] = 0,
    output: Annotated[Path, typer.Option(help="The CSV file that the rows are appended to.")] = Path(
        "benchmarks/results.csv"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the settings, and stop.")] = False,
) -> None:
    """Measure methods against each other and append the results to a CSV file."""
    if context.invoked_subcommand is not None:
        return
    from paca.bench.settings import DEFAULT_METHODS, BenchSettings

    given = {name: value for name, value in context.params.items() if name in BenchSettings.__dataclass_fields__}
    settings = BenchSettings(
        **given
        | {
            "methods": DEFAULT_METHODS if methods is None else _names(methods),
            "seq": _numbers("seq", seq),
            "batch": _numbers("batch", batch),
            "measure": _names(measure),
            "memory": None if memory is None else parse_bytes(memory),
            "compile": compile_,
        }
    )
    settings.shape()
    from paca.bench.methods import check_baseline, find_methods
    from paca.bench.rows import Row, append_rows, check_output, read_rows

    check_baseline(settings.baseline, find_methods(settings.methods))
    check_output(output)
    import_libraries()
    console = Console()
    on = settings.torch_device
    if dry_run:
        for name, value in asdict(settings).items():
            say(console, f"{name:<14} {value}")
        return
    from paca.bench.report import tables
    from paca.bench.run import run_benchmark
    from paca.training.freed_memory import keep_freed_memory

    if on.type == "cpu":
        keep_freed_memory()  # as paca train does: no step waits for pages of memory, whatever the method

    rows: list[Row] = []
    start = time.monotonic()

    def write(found: list[Row]) -> None:
        append_rows(output, found)
        rows.extend(found)

    def report_progress(line: str) -> None:
        elapsed = time.monotonic() - start
        say(console, f"[{elapsed:6.1f} s] {line}")

    run_benchmark(settings, write, report_progress)
    if rows:
        measured = read_rows(output)
        shown = tables(measured[measured["run"] == rows[0]["run"]])
        say(console, f"\n{shown}")
    say(console, f"{len(rows)} rows appended to {output}")


@bench.command(cls=Command)
def methods() -> None:
    """List the methods and the presets."""
    from paca.bench.methods import METHODS
    from paca.pretrained.published_shapes import SHAPES

    for method in METHODS.values():
        print(f"{method.name:<28} {method.summary}")
    print("\nA method may have settings of its own: paca:r=72:target_modules=o_proj+down_proj")
    print(f"\npresets: {', '.join(SHAPES)}")


@bench.command(cls=Command)
def report(
    files: Annotated[list[Path], typer.Argument(metavar="ROWS.csv…", help="What `paca bench` wrote.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Methods to show ratios against.", show_default="the runs' own")
    ] = None,
    plots: Annotated[Path, typer.Option(help="The folder for the pictures.")] = Path("benchmarks/plots"),
    name: Annotated[
        str | None, typer.Option(help="Beginning of the pictures' names.", show_default="the file's")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file, not to the screen.")] = None,
    readme: Annotated[
        Path | None,
        typer.Option(help="Write ratios and a picture into this file, between its bench:begin and bench:end."),
    ] = None,
) -> None:
    """Turn rows into tables and pictures."""
    import os

    import pandas as pd

    from paca.bench.plots import write_plots
    from paca.bench.report import baselines_of, replace_block, summary_tables, tables
    from paca.bench.rows import read_rows

    rows = pd.concat([read_rows(file) for file in files], ignore_index=True)
    baselines = _names(baseline) if baseline else ()
    there = set(rows["method"])
    if unknown := [method for method in baselines if method not in there]:
        raise PacaError(
            f"There are no rows of {', '.join(unknown)} to compare with. There are: {', '.join(sorted(there))}."
        )
    text = tables(rows, baselines)
    pictures = write_plots(rows, plots, name or files[0].stem, baselines[0] if baselines else None)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text, encoding="utf-8")
    elif readme is None:
        print(text)
    if readme is not None:
        shown = [f"![{path.stem}]({os.path.relpath(path, readme.parent)})" for path in pictures[:1]]
        source = ", ".join(f"[{file.name}]({os.path.relpath(file, readme.parent)})" for file in files)
        summary = summary_tables(rows, baselines or baselines_of(rows))
        whole = f" ([all of it, with spreads]({os.path.relpath(markdown, readme.parent)}))" if markdown else ""
        made = f"Medians of ratios within a round; made by `paca bench report` from the rows in {source}{whole}."
        replace_block(readme, "\n".join([*shown, "", summary, made]))
    for path in pictures:
        print(f"Written: {path}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise PacaError(f"--{option} is {text!r}; give whole numbers with commas between, such as 512,2048.") from None

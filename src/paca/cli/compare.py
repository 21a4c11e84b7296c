"""`paca compare`: should I use this instead of LoRA, on my task?"""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from paca.cli.ending import sigterm_as_ctrl_c
from paca.cli.starting import import_libraries
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean_path
from paca.messages.program import program
from paca.messages.say import console_for_tables, say

if TYPE_CHECKING:
    from paca.comparison.results import ComparisonResult


def compare(
    context: typer.Context,
    what: Annotated[list[Path], typer.Argument(metavar="RUN.yaml|RUN_FOLDER", help="What to train, or finished runs.")],
    output: Annotated[Path, typer.Option(help="The folder for runs and report. Give it again to go on.")],
    methods: Annotated[
        str,
        typer.Option(metavar="A,B,…", help="Methods: paca, lora, lora-tuned, full, one of PEFT's, or name=FILE.yaml."),
    ] = "paca,lora,lora-tuned",
    lr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,RATE,…",
            help="Learning rates to choose from. METHOD=RATE,… gives a method its own, and may be repeated. "
            "\\[default: auto, three around the rate of paca train]",
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(metavar="N,N,…", help="The seeds, not how many. Rates are chosen with the first.")
    ] = "0,1,2",
    equal: Annotated[
        Literal["parameters", "time", "memory", "parameters,time", "memory,time"] | None,
        typer.Option(help="What to make the same for all methods; the first one leads."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend/--no-extend", help="Try further rates while the first or last one is the best.")
    ] = True,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the YAML. May be repeated."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show what would be trained, and stop. With --equal time or memory it measures first."
        ),
    ] = False,
) -> None:
    """Compare methods on the same data and seeds, each at its best rate, and give a verdict."""
    console = console_for_tables()
    if output.exists() and not output.is_dir():
        raise PacaError(f"--output {output} is a file; a folder was expected, which may be new. Give another name.")
    for path in what:
        if not path.exists():
            raise PacaError(
                f"There is no file {path} and no folder of that name.{did_you_mean_path(path, _is_run)} Give a run's "
                "YAML, or run folders."
            )
    train = len(what) == 1 and not what[0].is_dir()
    if not train:
        _refuse_files(what)
        _refuse_options_of_training(context)
    try:
        with sigterm_as_ctrl_c():  # so that a run in progress saves its checkpoint
            if train:
                result = _train(what[0], set_ or [], methods, lr or [], seeds, equal, extend, dry_run, output, console)
            else:
                import_libraries()
                from paca.comparison.compare import compare_folders

                result = compare_folders(what, output)
    except KeyboardInterrupt:
        say(console, "\nStopped. What is finished is kept; the same command goes on from there:")
        say(console, f"  {program()} {shlex.join(sys.argv[1:])}")
        if train and len(list(output.glob("runs/*/summary.json"))) > 1:
            so_far = shlex.join(["compare", str(output), "--output", f"{output}-so-far"])
            say(console, f"The finished runs side by side: {program()} {so_far}")
        raise typer.Exit(130) from None
    if result is not None:
        show_result(result, output, console)


def _train(
    config: Path,
    overrides: list[str],
    methods: str,
    lr: list[str],
    seeds: str,
    equal: str | None,
    extend: bool,
    dry_run: bool,
    output: Path,
    console: Console,
) -> ComparisonResult | None:
    # What is wrong by itself comes first: the imports below take seconds.
    from paca.comparison.flags import rates_of, seeds_of

    rates, numbers = rates_of(lr), seeds_of(seeds)
    from paca.comparison.methods import methods_of
    from paca.comparison.settings import Comparison, load_common

    common, without_effect = load_common(config, overrides)
    import_libraries()
    chosen = methods_of(methods, common)
    from datasets import disable_progress_bars

    from paca.comparison.compare import compare
    from paca.comparison.plan_table import data_text, disk_text, no_verdict_text, rates_text, table_of, work_text
    from paca.comparison.prepare import prepare
    from paca.comparison.work import Work
    from paca.training.products import tell_of_products

    disable_progress_bars()
    same = tuple(equal.split(",")) if equal else ()
    keeps = not dry_run or output.exists() or not {"time", "memory"}.isdisjoint(same)  # what is measured is kept
    busy = console.status("Reading the data, and the shapes of the model with each method ...")
    with (
        nullcontext(output) if keeps else TemporaryDirectory() as folder,
        busy if console.is_terminal else nullcontext(),
    ):
        comparison = Comparison(Path(folder), common, chosen, rates, numbers, same, extend)
        planned = prepare(comparison, console, dry_run=dry_run)
    console.print(table_of(planned))
    for line in no_verdict_text(planned, len(numbers)):
        say(console, line, style="yellow")
    say(console, data_text(planned))
    grids = comparison.grids()
    which = f"the one seed {numbers[0]}" if len(numbers) == 1 else f"seeds {', '.join(map(str, numbers))}"
    say(console, f"{rates_text(grids, extend=extend)}; {which}")
    say(console, work_text(planned, grids, len(numbers), extend=extend))
    if dry_run:
        times = Work(comparison, {}, console).told_of_time()
        if times is None and "step_seconds" not in planned[0].came_out.measured:
            least = f"`{program()} plan {shlex.quote(str(config))}` tells the least that a run takes"
            times = f"time: {least}; the time left is told from the first run's first step on"
        if times is not None:
            say(console, times)
    say(console, disk_text(planned, grids, len(numbers)))
    for line in without_effect:
        say(console, line, style="yellow")
    first = planned[0].plan
    tell_of_products(first.config, first.dtype, console)
    if (warning := first.told_of_trained()) is not None:
        say(console, f"Warning: {warning}", style="yellow")
    return None if dry_run else compare(comparison, planned, console)


def _refuse_files(what: list[Path]) -> None:
    file = next((path for path in what if not path.is_dir()), None)
    if file is not None:
        raise PacaError(
            f"{file} is a file beside others; expected one YAML alone, which is trained, or folders of runs. Give one "
            "YAML, and what differs from it as methods: --methods paca,NAME=FILE.yaml"
        )


def _refuse_options_of_training(context: typer.Context) -> None:
    names = {"methods": "--methods", "lr": "--lr", "seeds": "--seeds", "equal": "--equal", "extend": "--extend",
             "set_": "--set", "dry_run": "--dry-run"}  # fmt: skip
    sources = {flag: context.get_parameter_source(name) for name, flag in names.items()}
    given = [flag for flag, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise PacaError(
            f"{', '.join(given)} would change nothing: run folders are not trained again. Leave it out, or give the "
            "YAML of a run."
        )


def show_result(result: ComparisonResult, output: Path, console: Console) -> None:
    """Print the table of methods, the verdict, and where the report is."""
    from paca.comparison.report import method_table, note_on_intervals

    heads, rows = whole = method_table(result)
    table = Table(*heads[:8], box=None, header_style="dim", pad_edge=False)
    for row in rows:
        table.add_row(*row[:8])
    console.print(table)
    say(console, f"\n{result.verdict}", style="bold")
    for line in result.judged_by:
        say(console, line)
    for line in result.too_few:
        say(console, line, style="yellow")
    for line in [*result.cost, *note_on_intervals(whole)]:
        say(console, line)
    for edge in result.edges.values():
        say(console, edge.note, style="yellow")
    say(console, f"Written: {output / 'comparison.html'}, comparison.md, comparison.json")


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".yaml", ".yml")

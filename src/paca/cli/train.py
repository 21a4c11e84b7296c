"""`paca train`: run what a YAML file describes."""

from __future__ import annotations

import os
import shlex
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from paca.cli.counted import Counted
from paca.cli.starting import import_libraries, loading_libraries
from paca.messages.errors import PacaError
from paca.messages.processes import check_launchers_variables
from paca.messages.program import program
from paca.messages.say import console_for_tables, say
from paca.messages.units import format_bytes, format_duration

if TYPE_CHECKING:
    from paca.evaluation.own_data import Measurement
    from paca.training import RunResult
    from paca.training.config.run_config import RunConfig


def train(
    config: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run: its model, data and method.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the YAML. May be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained, and stop.")] = False,
    settings: Annotated[
        bool, typer.Option("--settings", help="With --dry-run: also show every setting as YAML.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="First run the longest batch, to see whether the memory suffices.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="When finished, put the result into a private repository on the Hugging Face hub.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model and leave a run folder: adapter, metrics, summary, report."""
    if settings and not dry_run:
        raise PacaError("--settings goes with --dry-run; a run writes them to the config.yaml of its folder.")
    if probe and dry_run:
        raise PacaError(
            "--probe runs a batch, and --dry-run stops before anything is run. Leave one out; `paca plan` foretells "
            "the memory."
        )
    from paca.training.config.config_file import load_run_config

    check_launchers_variables()
    console = console_for_tables(quiet=os.environ.get("RANK", "0") != "0")
    check = None if dry_run or console.quiet else partial(_check_folder, resume)
    with loading_libraries():
        run_config = load_run_config(config, set_ or (), to_train=True, all_used=not resume, check=check)
    if push_to_hub is not None and not console.quiet:
        from paca.pretrained.upload import check_login

        check_login(push_to_hub)
    import_libraries()
    if console.quiet or not console.is_terminal:
        from datasets import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()  # of reading and tokenizing; in a log file they are noise
        disable_progress_bar()  # of writing a whole model
    from paca.evaluation.own_data import scorer

    if dry_run:
        _show_dry_run(run_config, settings, scorer(run_config.eval), console)
        return

    import torch

    from paca.training.freed_memory import keep_freed_memory
    from paca.training.run import train as run

    if not torch.accelerator.is_available():
        keep_freed_memory()
    try:
        with Counted(console) as counted:
            wanted = scorer(run_config.eval, counted)
            result = run(run_config, resume=resume, console=console, probe=probe, scorer=wanted)
    except KeyboardInterrupt:
        # The end is near and only has to be told: no further signal may cut the message off.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A new console, as the old one may have been stopped halfway through a print, whose text it would print again.
        stopped = f"Stopped at once. {_newest_checkpoint(Path(run_config.output.dir))}"
        say(Console(quiet=console.quiet), stopped)
        raise typer.Exit(130) from None
    if not result.saved:
        say(console, f"Stopped, without a checkpoint of this step. {_newest_checkpoint(result.folder)}")
        raise typer.Exit(130)
    if result.resume_command is not None:
        say(console, "Stopped; the checkpoint is saved. Continue with:")
        say(console, f"  {result.resume_command}")
        raise typer.Exit(130)
    show_result(result, console)
    if push_to_hub is not None and not console.quiet:
        _push(result.folder, push_to_hub)


def _check_folder(resume: bool, config: RunConfig) -> None:
    """Refuse a folder where this run can't begin, or not go on. The run does so too: here it costs no import."""
    from paca.training.folder.run_folder import RunFolder

    folder = RunFolder(Path(config.output.dir).expanduser())
    if resume and folder.finished():
        return
    if not resume and not folder.path.exists():
        folder.check_writable()
        return
    with folder.in_use() if folder.path.exists() else nullcontext():
        if not resume:
            folder.check_free(overwrite=config.output.overwrite, used=config.paths_used())
        elif folder.newest_checkpoint() is None:
            folder.reopen()


def _push(run: Path, repo: str) -> None:
    from paca.cli.push import push

    try:
        push(str(run), repo)
    except PacaError as error:
        again = f"{program()} push {shlex.quote(str(run))} --to {repo}"
        raise PacaError(f"The run is finished, but not on the hub. {error} To try again: {again}") from error


def _show_dry_run(config: RunConfig, settings: bool, measurement: Measurement | None, console: Console) -> None:
    from paca.training.config.train_settings import training_arguments
    from paca.training.folder.run_folder import RunFolder
    from paca.training.plan import show_plan
    from paca.training.prepare import prepare
    from paca.training.reporting.data_preview import show_sample

    folder = RunFolder(Path(config.output.dir))
    folder.check_writable()
    prepared = prepare(config, whole=False)
    plan, held_out = prepared.plan, prepared.plan.data.eval
    show_plan(plan, console)
    if measurement is not None and held_out is not None:
        measurement.check(held_out.dataset, prepared.outline)
    if plan.data.sample is not None:
        show_sample(plan.data.sample, console)
    if settings:
        say(console, f"\n{plan.config.to_yaml()}", end="")
    try:
        folder.check_free(overwrite=config.output.overwrite, used=config.paths_used())
    except PacaError as taken:  # no mistake in the file
        say(console, f"\nBefore it is trained: {taken}", "yellow")
    training_arguments(plan.config.train, folder.checkpoints)  # what can't be is told as by a run
    if (told := plan.refusal()) is not None:
        raise PacaError(f"A run refuses this: {told}")


def show_result(result: RunResult, console: Console) -> None:
    """Print what came out and where it lies."""
    if result.summary is None:  # not the first process
        return
    from paca.training.reporting.scores import score_lines

    summary = result.summary
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    trained, took = format_duration(summary["train_seconds"]), format_duration(summary["seconds"])
    asked, scores = summary["config"]["eval"], summary["scores"] or {}
    took += " with evaluations and checkpoints"
    if asked["metric"] is not None and "scores_seconds" in summary:  # older runs have it not
        took += f", and {format_duration(summary['scores_seconds'])} more for {asked['metric']}"
    lines = []
    if after is not None:
        best = summary.get("kept_step", summary["steps"])  # older runs have it not
        told = "" if best == summary["steps"] else f" (the weights of step {best:,}, the best, are kept)"
        lines.append(("held-out loss", f"{after:.4f}{told}" if before is None else f"{before:.4f} → {after:.4f}{told}"))
    lines += score_lines(summary["scores"])
    lines += [
        (f"{summary['counts']} per second", f"{summary['tokens_per_second']:,.0f}"),
        ("peak memory", f"{format_bytes(summary['peak_memory_bytes'])} ({summary['peak_memory_of']})"),
        ("time", f"{trained} for {summary['steps']:,} steps, {took}"),
        (weights := "model" if summary["method"]["name"] == "full" else "adapter", str(result.folder / weights)),
        ("report", str(result.folder / "report.html")),
    ]
    for label, text in lines:
        say(console, f"{label:<18} {text}")
    if not scores and before is not None and after is not None and after > before:  # nothing else speaks for the run
        rate = summary["config"]["train"]["learning_rate"]
        told = (
            "The held-out loss rose: the model fits data.eval less well than before. Try a lower train.learning_rate "
            f"(now {rate:g}), more data or fewer epochs."
        )
        say(console, told, style="yellow")
    if asked["answer_pattern"] is None and (scores.get("after") or {}).get("exact_match") == 0:
        told = (
            "No answer is its whole reference, which exact_match compares; answers end after "
            f"{asked['max_new_tokens']:,} tokens (eval.max_new_tokens). eval.answer_pattern compares a part, such as "
            "what follows a mark."
        )
        say(console, told, style="yellow")


def _newest_checkpoint(output: Path) -> str:
    from paca.training.folder.run_folder import RunFolder

    newest = RunFolder(output).newest_checkpoint()
    if newest is None:
        return f"There is no checkpoint in {output}."
    return f"The newest checkpoint is {newest}; continue from it with --resume."

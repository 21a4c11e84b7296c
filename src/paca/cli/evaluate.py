"""`paca evaluate`: how good a model is, with and without its adapter."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from paca.cli.counted import Counted
from paca.cli.ending import sigterm_as_ctrl_c
from paca.cli.evaluate_tables import print_ratings, print_table, say_what_is_left
from paca.cli.starting import import_libraries
from paca.evaluation.kept_lines import alone_in
from paca.messages.errors import PacaError
from paca.messages.install import how_to_install
from paca.messages.program import program
from paca.messages.say import console_for_tables, say
from paca.pretrained.adapter_folder import base_of_whole, find_adapter
from paca.pretrained.purpose import classifier_in

JUDGE_KEY = "PACA_JUDGE_KEY"


def evaluate(
    path: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run, an adapter or a model; or hub id.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The folder for results. Give it again to go on.", show_default="none is kept"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Measure a run on this in place of its data.eval, or an adapter's loss: a file, images, a hub id.",
            show_default="the run's data.eval",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=YOURS,…",
            help="Columns of --data under other names: question=Frage,answer=Antwort. May be repeated.",
            show_default="the run's data.columns",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="eval.KEY=VALUE",
            help="Change what is measured, such as eval.metric or eval.answer_pattern. May be repeated.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Tasks of lm-evaluation-harness by name, and your own .yaml files."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.", show_default="as the task says")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in one forward pass.")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask in the form of the tokenizer's chat template.")
    ] = False,
    mt_bench: Annotated[
        Path | None, typer.Option(metavar="QUESTIONS.jsonl", help="MT-Bench: FastChat's file of questions.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="MT-Bench: address of the judge, which speaks OpenAI's protocol (http://host:8000/v1)."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help=f"MT-Bench: the judge's name there. Its key is read from {JUDGE_KEY}.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="MT-Bench: longest answer, in tokens.", show_default="1024, or a quarter of the context"
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub id.", show_default="where the adapter says")
    ] = None,
) -> None:
    """Evaluate base and adapter side by side: public benchmarks, tasks of your own, MT-Bench, a run's own data.

    Without --tasks and --mt-bench it measures a run's eval.metric, or a classifier's accuracy, on its data.eval or on
    --data; of an adapter or a model that no run left, on --data, the loss or what --set eval.metric=... names.
    """
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise PacaError("--tasks names no task. Give some, such as arc_easy,my_task.yaml, or leave it out.")
    own_data = not names and mt_bench is None
    if data is not None and not own_data:
        raise PacaError(
            "--data is measured by a run's own eval.metric; --tasks and --mt-bench bring data. Leave one out."
        )
    if columns and data is None:
        raise PacaError("--columns names columns of --data. Give that, or leave it out.")
    named = columns_of_flag(*columns) if columns else None
    if output is None and not own_data:
        raise PacaError("--tasks and --mt-bench need a folder for their results. Give one: --output DIR.")
    if (mt_bench is None) != (judge_url is None) or (mt_bench is None) != (judge_model is None):
        raise PacaError("--mt-bench, --judge-url and --judge-model go together: questions, and who rates the answers.")
    for flag, given in (("--num-fewshot", num_fewshot is not None), ("--chat-template", chat_template)):
        if given and not names:
            raise PacaError(f"{flag} goes with --tasks; a run's own data is asked as it was trained on. Leave it out.")
    if max_new_tokens is not None and mt_bench is None:
        raise PacaError("--max-new-tokens goes with --mt-bench. Of a run's own data it is eval.max_new_tokens.")
    _check_overrides(set_ or [], own_data)
    find_adapter(path, or_hub=True)  # before what it takes to load one: a wrong path is no reason to wait
    if own_data and data is None and not (Path(path) / "config.yaml").is_file():
        raise PacaError(
            f"There is nothing to evaluate {path} on: it is no folder of a run, which has data of its own. Give "
            "--data, --tasks, such as arc_easy,my_task.yaml, or --mt-bench."
        )
    if names and importlib.util.find_spec("lm_eval") is None:
        from paca.pretrained.purpose import check_answers

        check_answers(path)
        raise PacaError(f"--tasks needs lm-evaluation-harness. {how_to_install('evaluate', 'lm-eval')}")
    # Read as tqdm is imported: one progress line instead of the five of the libraries.
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = console_for_tables()
    try:
        with sigterm_as_ctrl_c(), alone_in(output), Counted(console) as shown:
            say(console, f"Loading {path} ...")
            import_libraries()
            from paca.pretrained.bounded_template import check_template_ends
            from paca.pretrained.generation import load_for_generation

            if own_data:
                _measure_own_data(path, data, named, set_ or [], base_model, limit, batch_size, output, shown, console)
                return
            assert output is not None
            if names:  # a wrong name is no reason to wait for the model
                logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings tell of defaults that it takes
                from paca.evaluation.task_files import load_tasks

                found = load_tasks(names, Path(path))
            if mt_bench is not None:
                from paca.evaluation.mt_bench_questions import read_questions

                questions = read_questions(mt_bench, limit)
            loaded = load_for_generation(path, base_model=base_model)
            check_template_ends(loaded.tokenizer)
            if names:
                from paca.evaluation.harness import HarnessSettings, evaluate_tasks
                from paca.evaluation.side_by_side import rows_of
                from paca.pretrained.conversation import other_form

                if remark := other_form(loaded, chat_template):  # now, while there is time to ask otherwise
                    say(console, remark, "yellow")
                settings = HarnessSettings(num_fewshot, limit, batch_size, chat_template)
                results = evaluate_tasks(loaded, found, settings, output, shown)
                shown.finish()
                print_table(console, rows_of(results))
                say_what_is_left(loaded, console)
                say(console, f"Written: {output / 'results.json'}")
            if mt_bench is not None and judge_url is not None and judge_model is not None:
                from paca.evaluation.judge import Judge
                from paca.evaluation.judge_settings import JudgeSettings
                from paca.evaluation.mt_bench import run_mt_bench

                judge = Judge(JudgeSettings(judge_url, judge_model, key=os.environ.get(JUDGE_KEY)))
                folder = output / "mt_bench"
                judged = run_mt_bench(
                    loaded, questions, judge, folder, shown, max_new_tokens=max_new_tokens, batch_size=batch_size
                )
                shown.finish()
                print_ratings(console, judged)
                if max_new_tokens is None and (longest := judged["max_new_tokens"]) < 1024:
                    told = f"Answers were cut at {longest:,} tokens, so that two of them fit the model's context"
                    say(console, f"{told} (--max-new-tokens for another length).")
                say_what_is_left(loaded, console)
                say(console, f"Written: {folder / 'results.json'}")
    except KeyboardInterrupt:
        if output is None:
            say(console, "\nStopped. Nothing is kept without a folder for it: --output DIR")
            raise typer.Exit(130) from None
        say(console, "\nStopped. What was answered is kept; the same command goes on from there:")
        say(console, f"  {program()} {shlex.join(sys.argv[1:])}")
        raise typer.Exit(130) from None


def _check_overrides(overrides: list[str], own_data: bool) -> None:
    if overrides and not own_data:
        raise PacaError("--set changes what a run's own data is measured by; --tasks and --mt-bench say it themselves.")
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "eval.limit":
            raise PacaError(f"--set {override}: of paca evaluate that is --limit.")
        from paca.training.config.run_config import MEASURED_BY

        if key not in MEASURED_BY:
            known = ", ".join(MEASURED_BY)
            raise PacaError(f"--set {override}: only {known} can be changed, as eval.metric=exact_match.")


def columns_of_flag(*texts: str) -> dict[str, str]:
    """Columns as a flag has them, `question=Frage,answer=Antwort`, of all its uses; the last one of a name holds. Raise
    `PacaError` for another text."""
    named: dict[str, str] = {}
    for text in texts:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name.strip() and own.strip() for name, _, own in pairs):
            raise PacaError(
                f"--columns is {text!r}; expected a form's names, each with yours: question=Frage,answer=Antwort."
            )
        named |= {name.strip(): own.strip() for name, _, own in pairs}
    return named


def _measure_own_data(
    path: str,
    data: str | None,
    columns: dict[str, str] | None,
    overrides: list[str],
    base_model: str | None,
    limit: int | None,
    batch_size: int,
    output: Path | None,
    shown: Counted,
    console: Console,
) -> None:
    from paca.evaluation import own_run
    from paca.evaluation.sides import told_of_base

    config = own_run.config_of_run(path, data, columns, overrides)
    if data is None:
        held_out, note = own_run.held_out_of(path, config, limit)
    else:
        try:
            held_out = own_run.other_data(path, config, columns_given=columns is not None)
        except PacaError as error:
            if not columns:
                raise
            raise PacaError(re.sub(r"data\.columns(?!: {|\.NAME)", "--columns", str(error))) from error  # but in YAML
        note = own_run.trained_on(path, held_out)
        say(console, f"{data}: {held_out.description}")
        if other := own_run.other_form(path, held_out, own_run.metric_of(config)):
            say(console, other, "yellow")
    if note is not None:
        say(console, note, "yellow")
    if (began := told_of_base(path)) is not None:
        say(console, began)
    loaded = own_run.load_run(path, config, base_model)
    what = "held-out data" if data is None else Path(data).name
    of_run = "the run's " if data is None else ""
    last = " (the last answer of each conversation)" if own_run.has_turns(held_out) else ""
    say(console, f"Measuring {own_run.metric_of(config)}{config.eval.compared} on {of_run}{what}{last} ...")
    if output is None:
        say(console, "(with --output DIR answers are kept as they come, and the same command goes on)")
    try:
        scores = own_run.evaluate_run(loaded, config, held_out, limit, batch_size, output, shown)
    except PacaError as error:
        from paca.training.config.run_config import MEASURED_BY

        where = " (Here: --set eval.KEY=VALUE.)" if any(key in str(error) for key in MEASURED_BY) else ""
        raise PacaError(f"{error}{where}") from error
    shown.finish()
    print_table(console, own_run.rows_of_run(scores, what))
    say_what_is_left(loaded, console)
    if classifier_in(path) is None and (trained_from := base_of_whole(loaded.base)) is not None:
        given = shlex.quote(config.data.eval) if isinstance(config.data.eval, str) else "FILE"
        command = f"{program()} evaluate {shlex.quote(trained_from)} --data {given}"
        say(console, f"The run trained the whole model, so its base is not beside it. The base's loss: {command}")
    if output is not None:
        say(console, f"Written: {own_run.write_scores(output, scores, data or f'data.eval: {config.data.eval}')}")

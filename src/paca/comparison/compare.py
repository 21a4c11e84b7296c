"""A comparison from its settings to its report: of runs that it trains, or of runs that are there already."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from paca.comparison.comparable import contents_of, trained_alike, unlike
from paca.comparison.edges import Edge, edge_of
from paca.comparison.kept_rows import ROWS, KeptRows
from paca.comparison.method_result import MethodResult, why_failed
from paca.comparison.methods import Method, own_section
from paca.comparison.plan_table import PlannedMethod, settings_text
from paca.comparison.report import write_report
from paca.comparison.results import ComparisonResult
from paca.comparison.rows import SHARES, Row, row_of, write_rows
from paca.comparison.settings import Comparison
from paca.comparison.training_process import how_to_try_again
from paca.comparison.work import Work, names_of
from paca.messages.errors import PacaError
from paca.training.folder.run_folder import RunFolder
from paca.training.folder.same_run import FREE_TO_CHANGE

_TOLD = (
    "peft_type", "r", "paca_alpha", "lora_alpha", "target_modules", "use_dora", "use_rslora", "selection",
    "rotate_every",
)  # fmt: skip
"""Settings of a run that is there already which a table has room for."""


def compare(comparison: Comparison, planned: Sequence[PlannedMethod], console: Console) -> ComparisonResult:
    """Train what is not trained yet, and report.

    Args:
        comparison: As `paca.comparison.prepare` left it.
        planned: What that found.
        console: Where progress is shown.

    Returns:
        What the report in the comparison's folder says.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same comparison goes on from there.
    """
    work = Work(comparison, {one.method.name: one.plan.steps for one in planned}, console)
    work.run()
    plan = work.schedule()
    rows = {job: row for job in plan.jobs if (row := work.row(job)) is not None}
    methods = []
    peaks = {one.method.name: one.came_out.measured.get("peak") for one in planned}
    for method in comparison.methods:
        tried = [row for job, row in rows.items() if job.method == method.name]
        rate = plan.chosen.get(method.name)
        chosen = [row for row in tried if row["learning_rate"] == rate and row["score"] is not None]
        methods.append(MethodResult(method.name, settings_text(method), rate, chosen, tried, peaks[method.name]))
    found = {method.name: edge_of(method, comparison.runs) for method in methods}
    edges = {name: edge for name, edge in found.items() if edge is not None}
    notes = [*_notes(comparison, planned, methods, edges), *(edge.note for edge in edges.values())]
    if work.by_row:
        told = "Their folders are gone, so they count by their rows, and the loss over time is not drawn for them"
        notes.append(f"{told}: {names_of(work.by_row)}.")
    result = ComparisonResult(methods, notes, comparison.equal, edges)
    write_report(comparison.path, result, {job.name: comparison.folder(job) for job in rows})
    return result


def _runs_of(path: Path) -> list[Path]:
    if not (path / "settings.json").is_file() or not (path / "runs").is_dir():
        return [path]
    kept = KeptRows(path / ROWS).others([])  # in the order in which they ended: the first method's come first
    kept = [row for row in kept if RunFolder(path / "runs" / row["name"]).finished()]
    scored = [row for row in kept if row["method"] == kept[0]["method"] and row["score"] is not None]
    best = min(scored, key=lambda row: row["score"] if row["lower_is_better"] else -row["score"], default=None)
    runs = [path / "runs" / row["name"] for row in sorted(kept, key=lambda row: row is not best)]  # it leads the page
    if not runs:
        raise PacaError(f"{path} holds a comparison of which no run is finished yet. Go on with it, or wait.")
    return runs


def compare_folders(paths: Sequence[Path], output: Path) -> ComparisonResult:
    """Report on runs that are there already. Those that differ in the seed alone are one method.

    Args:
        paths: Their folders, or that of a comparison, which stands for its finished runs; the first one's method is
            the one that the others are compared with.
        output: Where the report goes.

    Raises:
        PacaError: A folder holds no finished run, or one without held-out data, or two hold the same method and seed,
            or there is one alone, or all are of one method, or they are judged by different metrics.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    if (output / "settings.json").is_file():
        raise PacaError(f"{output} holds a comparison that trains its runs. Give the report another --output.")
    if RunFolder(output).finished():
        raise PacaError(f"{output} is the folder of a run. Give the report another --output.")
    paths = [path if path.name.strip(".") else Path(os.path.abspath(path)) for path in paths]  # of "." and ".."
    paths = [run for path in paths for run in _runs_of(path)]
    names = [path.name for path in paths]
    folders: dict[str, RunFolder] = {}
    for path in paths:
        folder = RunFolder(path)
        if not folder.finished():
            raise PacaError(f"{path} holds no finished run (summary.json is missing). Finish it, or leave it out.")
        row = row_of(folder, re.sub(r"-seed\d+$", "", path.name))
        assert row is not None
        if row["score"] is None:
            raise PacaError(f"{path}: the run has no finite {row['metric']} on held-out data, so it can't be compared.")
        if names.count(path.name) > 1:  # in two parents
            row["name"] = str(path)
        settings = _without_seed(row["run_info"]["config"])
        number = next(n for n in itertools.count() if _has_same_contents([*groups.get((settings, n), []), row]))
        rows = groups.setdefault((settings, number), [])
        twin = next((one["name"] for one in rows if one["seed"] == row["seed"]), None)
        if twin is not None:
            raise PacaError(
                f"{folders[twin].path} and {path} hold the same settings and the same seed, {row['seed']}. Leave one "
                "out."
            )
        rows.append(row)
        folders[row["name"]] = folder
    if len(paths) < 2:
        raise PacaError(f"{paths[0]} is one run alone; two or more were expected, to be compared. Give further ones.")
    if len(groups) < 2:
        raise PacaError("These runs differ in nothing but their seeds, so there are no two methods to compare.")
    metrics = {row["name"]: row["metric"] for rows in groups.values() for row in rows}
    if len(set(metrics.values())) > 1:
        told = ", ".join(f"{metric} of {name}" for name, metric in metrics.items())
        raise PacaError(
            f"These runs are judged by different metrics ({told}), which one table can't show. Compare runs with the "
            "same eval.metric."
        )
    methods = []
    for rows in groups.values():
        rate = rows[0]["learning_rate"]
        methods.append(MethodResult(rows[0]["method"], _settings_told(rows[0]), rate, rows, rows))
    every = [row for method in methods for row in method.rows]
    notes = ["The runs were there already; nothing was chosen among them.", *_shared_notes(every)]
    result = ComparisonResult(_apart(methods), notes)
    write_report(output, result, folders)
    write_rows(output / ROWS, every)
    return result


def _notes(
    comparison: Comparison,
    planned: Sequence[PlannedMethod],
    methods: Sequence[MethodResult],
    edges: Mapping[str, Edge],
) -> list[str]:
    seed, notes = comparison.seeds[0], []
    if any(len({row["learning_rate"] for row in method.tried}) > 1 for method in methods):
        notes.append(
            f"The rate of each method is its best of those tried, by seed {seed}. That seed's score counts as well, so "
            "it is a little too good, for every method."
        )
        if any(row["metric"] in SHARES for method in methods for row in method.rows):
            notes[-1] += " Among shares that lie within one standard error, the loss decides."
    if trained_alike(row for method in methods for row in method.rows):
        notes.append("All methods train on the same data. A seed gives all of them the same order.")
    leader = planned[0].method.name
    if "time" in comparison.equal:
        for one in planned[1:]:
            ratio = one.came_out.measured["step_ratio"]
            scaled = " and ".join(f"{name} {count}" for name, count in one.came_out.measured.get("scaled", {}).items())
            notes.append(
                f"Equal time: a step of {one.method.name} took {ratio:.3f} × that of {leader}, so it makes "
                f"{one.plan.steps} steps where {leader} makes {planned[0].plan.steps}"
                f"{f' (and has {scaled}, in the same ratio)' if scaled else ''}."
            )
    for what in ("parameters", "memory"):
        if what in comparison.equal:
            notes.append(f"Equal {what}: each method's r was chosen to match {leader}.")
    notes += [f"{one.method.name} {one.came_out.note}." for one in planned if one.came_out.note]
    told = {name for edge in edges.values() for name in edge.failed}
    for row in (row for method in methods for row in method.failed if row["name"] not in told):
        ended = row["train_info"]["status"] == "success"
        again = "" if ended else f" {how_to_try_again(RunFolder(comparison.runs / row['name']))}"
        notes.append(f"{row['name']} failed: {why_failed(row).rstrip('.')}.{again}")
    expected = ["steps"] if "time" in comparison.equal else []
    return notes + _shared_notes((row for method in methods for row in method.rows), expected)


def _shared_notes(rows: Iterable[Row], expected: Sequence[str] = ()) -> list[str]:
    rows = list(rows)
    differing = [name for name in unlike(rows) if name not in expected]
    notes = [f"Not the same for all runs: {', '.join(differing)}."] if differing else []
    if any((row["meta_info"]["git"] or {}).get("dirty") for row in rows):
        notes.append("The working folder had changes that were not committed.")
    if any((row["meta_info"].get("code") or {}).get("dirty") for row in rows):
        notes.append("paca's own files had changes that were not committed.")
    return notes


def _has_same_contents(rows: list[Row]) -> bool:
    """Whether data and functions of the same settings meant the same in all runs, as far as is known."""
    known: dict[str, set[str]] = {}
    for row in rows:
        for key, content in contents_of(row).items():
            if key.startswith(("data.", "train.")):
                known.setdefault(key, set()).add(content)
    return all(len(found) == 1 for found in known.values())


def _without_seed(config: dict[str, dict[str, Any]]) -> str:
    kept = {name: dict(values) for name, values in config.items() if name != "output"}
    # Of a comparison's runs one alone scores the model as it came.
    for name in ("train.seed", "paca.random_seed", "eval.before", *FREE_TO_CHANGE):
        section, _, key = name.partition(".")
        kept.get(section, {}).pop(key, None)
    return json.dumps(kept, sort_keys=True)


def _settings_told(row: Row) -> str:
    config = row["run_info"]["config"]
    kind = own_section(config)
    told = {name: value for name, value in config.get(kind, {}).items() if name in _TOLD}
    return settings_text(Method(kind, {kind: told}))


def _apart(methods: list[MethodResult]) -> list[MethodResult]:
    """Names of methods told apart: two folders may have the same one."""
    names = [method.name for method in methods]
    return [
        replace(method, name=f"{method.name} ({number})") if names.count(method.name) > 1 else method
        for number, method in enumerate(methods, start=1)
    ]

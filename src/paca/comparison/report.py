"""`comparison.json`, `.html` and `.md`: what a comparison came to, for programs, for a browser and for a forge."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path

from paca.comparison.comparable import at
from paca.comparison.contrast import Contrast
from paca.comparison.method_result import MethodResult
from paca.comparison.pictures import Curve, loss_over_time, score_against, score_over_rates
from paca.comparison.results import ComparisonResult
from paca.comparison.rows import SHARES
from paca.comparison.statistics import Interval, signed
from paca.messages.units import format_bytes, format_duration
from paca.pretrained.whole_output import write_whole
from paca.training.folder.run_folder import RunFolder
from paca.training.reporting.metrics import read_rows
from paca.training.reporting.report import whole_page

Table = tuple[list[str], list[list[str]]]
_SEEDS, _SCORE = 2, 3
"""The column of the scores; that of their differences follows."""
_BARS = (
    "A bar is its method's own 95 % interval over the seeds. The verdict goes by the interval of the difference, seed "
    "by seed where methods share their seeds: bars may overlap where it says better."
)


def write_report(path: Path, result: ComparisonResult, folders: Mapping[str, RunFolder]) -> None:
    """Write the three files.

    Args:
        path: The folder they go to.
        result: What to tell.
        folders: Of the runs, by the name in their rows: their curves are drawn.
    """
    write_whole(path / "comparison.json", json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n")
    write_whole(path / "comparison.md", _markdown(path.name, result))
    write_whole(path / "comparison.html", _page(path.name, result, folders))


def method_table(result: ComparisonResult) -> Table:
    """Heads and cells: one row for the model as it came, then one a method; see `note_on_intervals`."""
    apart = f"{result.methods[0].name} minus it"
    heads = [
        "method", "rate", "seeds", f"{result.metric} ({result.good_sign})", apart, "training", _unit_of_speed(result),
        "peak memory", "trained parameters", "settings",
    ]  # fmt: skip
    rows = []
    if result.score_before is not None:
        rows.append(["before training", "", "", f"{result.score_before:.4f}", *[""] * 6])
    contrasts: list[Contrast | None] = [None, *result.contrasts]
    for method, contrast in zip(result.methods, contrasts, strict=True):
        rows.append(_method_row(method, contrast))
    return heads, rows


def _unit_of_speed(result: ComparisonResult) -> str:
    rows = [row for method in result.methods for row in method.tried]
    trainers = {(at(row, ("run_info", "config", "train")) or {}).get("trainer") for row in rows}
    return "images/s" if trainers == {"image_classification"} else "tokens/s"


def note_on_intervals(table: Table) -> list[str]:
    """What ± is, where the table of methods has one."""
    shown = any(" ± " in cell for row in table[1] for cell in row[_SCORE : _SCORE + 2])
    told = (
        "After ± is half of a 95 % interval, by Student's t over the seeds; where all seeds are alike it is left out."
    )
    if table[0][_SCORE].partition(" (")[0] in SHARES:
        told += " That of a difference also counts the examples as drawn by chance."
    if any(row[_SEEDS] == "2" for row in table[1]):
        told += " Two seeds are too few for it: it is very wide, or too narrow where both happen to differ by as much."
    return [told] if shown else []


def _method_row(method: MethodResult, contrast: Contrast | None) -> list[str]:
    score, time = method.score, method.mean("train_info", "train_time")
    peak = method.mean("train_info", "accelerator_memory_max")
    trained, speed = method.mean("train_info", "num_trainable_params"), method.mean("tokens_per_second")
    found = None if contrast is None else contrast.difference
    return [
        method.name,
        "" if method.rate is None else f"{method.rate:g}",
        f"{len(method.rows)}{f' ({len(method.lost)} failed)' if method.lost else ''}" if method.rows else "failed",
        "" if score is None else f"{score.mean:.4f}{_plus_minus(score)}",
        "" if found is None else f"{signed(found.mean)}{_plus_minus(found)}",  # as in the verdict
        "" if time is None else _time(time),
        "" if speed is None else f"{speed:,.0f}",
        "" if peak is None else format_bytes(peak),
        "" if trained is None else f"{trained:,.0f}",
        method.settings,
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def _plus_minus(found: Interval) -> str:
    return "" if not found.half else f" ± {found.half:.4f}"  # seeds that are all alike tell nothing of chance


def _run_table(result: ComparisonResult) -> Table:
    tried = [row for method in result.methods for row in method.tried]
    # By the trainer it is; `eval.metric: loss` is one over tokens.
    score_is_loss = result.metric == "loss" and all(row["score"] == row["loss"] for row in tried)
    judged = ["held-out loss"] if score_is_loss else [result.metric, "held-out loss"]
    heads = ["run", "rate", "seed", *judged, "steps", "training time", "peak memory"]
    rows = []
    for row in tried:
        info, loss = row["train_info"], row["loss"]
        failed = f"failed: {row['run_info']['error_msg']}" if info["status"] == "failed" else "not finite"
        time, peak = info["train_time"], info["accelerator_memory_max"]
        rows.append([
            row["name"],
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            str(row["seed"]),
            failed if row["score"] is None else f"{row['score']:.4f}",
            *([] if score_is_loss else ["" if loss is None else f"{loss:.4f}"]),
            str(row["steps"] or ""),
            "" if time is None else _time(time),
            "" if peak is None else format_bytes(peak),
        ])  # fmt: skip
    return heads, rows


def _markdown(title: str, result: ComparisonResult) -> str:
    table = method_table(result)
    notes = "".join(f"- {line}\n" for line in _told(result, table))
    return (
        f"# {title}\n\n**{result.verdict}**\n\n{_markdown_table(table)}\n{notes}\n"
        f"## Every run\n\n{_markdown_table(_run_table(result))}"
    )


def _told(result: ComparisonResult, table: Table) -> list[str]:
    return [*result.judged_by, *result.too_few, *result.cost, *result.notes, *note_on_intervals(table)]


def _markdown_table(table: Table) -> str:
    heads, rows = table
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _page(title: str, result: ComparisonResult, folders: Mapping[str, RunFolder]) -> str:
    curves = [(method, *_curves(method, folders)) for method in result.methods]
    pictures = [
        score_against(result, ("train_info", "train_time"), "seconds of training"),
        score_against(result, ("train_info", "accelerator_memory_max"), "peak memory (GiB)", 2**30),
    ]
    if any(len({row["learning_rate"] for row in method.tried}) > 1 for method in result.methods):
        pictures.append(score_over_rates(result))
    table = method_table(result)
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _told(result, table))
    has_bars = any(method.score is not None and method.score.half for method in result.methods)
    bars = f'<p class="sub">{_BARS}</p>' if has_bars else ""
    body = f"""<p><b>{html.escape(result.verdict)}</b></p>
<ul>{notes}</ul>
<h2>Methods</h2>
<div class="scroll"><table>{_html_table(table)}</table></div>
<h2>Score against time and memory</h2>
{bars}
<div class="curves">{"".join(f"<figure>{picture}</figure>" for picture in pictures)}</div>
<h2>Loss over time</h2>
<p class="sub">Of each method's first seed: strong lines on held-out data, faint ones in training.</p>
<figure>{loss_over_time(curves)}</figure>
<h2>Every run</h2>
<div class="scroll"><table>{_html_table(_run_table(result))}</table></div>
"""
    return whole_page(title, "paca comparison", ", ".join(method.name for method in result.methods), body)


def _html_table(table: Table) -> str:
    heads, rows = table
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _curves(method: MethodResult, folders: Mapping[str, RunFolder]) -> tuple[Curve, Curve]:
    """(seconds, loss) of the first seed: in training, and on held-out data at the seconds trained until then."""
    train: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []
    if not method.rows:
        return train, held_out
    metrics = folders[method.rows[0]["name"]].metrics
    for row in read_rows(metrics) if metrics.is_file() else []:  # deleted by hand
        if row.get("loss") is not None and "train_seconds" in row:
            train.append((row["train_seconds"], row["loss"]))
        elif row.get("eval_loss") is not None:
            held_out.append((train[-1][0] if train else 0.0, row["eval_loss"]))
    return train, held_out

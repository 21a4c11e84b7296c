"""Rows as Markdown: full tables, and small ones of ratios only, for which a README has room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paca.bench.rows import round_ratios, spread
from paca.messages.errors import PacaError
from paca.messages.units import format_bytes

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SETTING = (
    *("model", "scope", "loss", "dtype", "layers", "hidden", "vocab", "image_size", "rank", "optimizer"),
    *("device", "machine", "threads"),
)
"""What the rows of one table have in common."""

METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_time": ("step, ms", lambda value: f"{value * 1e3:.1f}"),
    "throughput": ("tokens/s", "{:,.0f}".format),
    "saved_per_token_and_layer": ("saved bytes per token and layer", "{:,.0f}".format),
    "saved_units_per_layer": ("in hidden states", "{:.1f}".format),
    "saved": ("saved activations", format_bytes),
    "peak_above_weights": ("peak above the weights", format_bytes),
    "peak_memory": ("peak memory", format_bytes),
    "longest_sequence": ("longest sequence", "{:,.0f}".format),
    "largest_batch": ("largest batch", "{:,.0f}".format),
    "switch_time": ("switch of adapters, ms", lambda value: f"{value * 1e3:.2f}"),
    "launches_per_step": ("launches per step", "{:,.0f}".format),
    "launches_per_layer": ("launches per layer", "{:,.1f}".format),
    "recompilations": ("recompilations over the rounds", "{:.0f}".format),
    "recompilations: first_switch": ("graphs at the first switch", "{:.0f}".format),
    "recompilations: switch_back": ("graphs when switching back and forth", "{:.0f}".format),
}
"""Title of each metric that has a column, and how a value of it is shown."""
_SUMMARY = {
    "step_time": "step time",
    "saved_per_token_and_layer": "saved activations",
    "peak_above_weights": "peak memory above the weights",
    "longest_sequence": "longest sequence",
}
_COMPARED = (*_SUMMARY, "saved", "largest_batch")
_SAME_AT_ALL_LENGTHS = ("saved_per_token_and_layer", "longest_sequence")
_BUDGETS = {"phase: ": "Phases of a step", "kind: ": "Kinds of work in a step, under the profiler"}
_NOISY_NOTE = (
    "noisy: the middle half of the rounds differs by more than a quarter, so the ratio decides nothing; measure on a "
    "quieter machine, or with more --rounds"
)


def by_setting(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """A title and the rows of each setting; of rows that measured the same thing the last one.

    The column `beside` has the samples of each method that the same run measured so, for `ratios_to`.
    """
    measured = [*SETTING, "batch", "seq", "budget", "variant", "metric"]
    beside: dict[Any, dict[str, Any]] = {}
    together = [beside.setdefault(key, {}) for key in rows[["run", *measured]].itertuples(index=False, name=None)]
    for found, method, samples in zip(together, rows["method"], rows["samples"], strict=True):
        found[method] = samples
    rows = rows.assign(beside=together)
    newest = rows.drop_duplicates([*measured, "method"], keep="last", ignore_index=True)
    for _, members in newest.groupby(list(SETTING), sort=False):
        yield _title(_records(members)[0]), members


def ratios_to(row: Any, baseline: str) -> list[float]:
    """The row's samples over the baseline's, round by round; empty unless one run measured both."""
    if row is None or not row.samples or not row.beside.get(baseline):
        return []
    return round_ratios(row.samples, row.beside[baseline])


def baselines_of(rows: pd.DataFrame) -> list[str]:
    """The methods that the runs took their ratios against."""
    return [name for name in rows["baseline"].unique() if name]


def tables(rows: pd.DataFrame, baselines: Sequence[str] = ()) -> str:
    """All rows: a heading per setting, a table per size of batch; of rows that measured the same thing the last one
    counts.

    Ratios are to the methods `baselines`, by default the ones that the runs named.
    """
    parts = []
    for title, members in by_setting(rows):
        parts.append(f"### {title}\n")
        against = list(baselines) or baselines_of(members)
        shown = members[members["metric"].isin(METRICS)]
        groups = shown.assign(searched=shown["budget"] > 0).groupby(["searched", "batch", "seq", "budget"])
        parts.extend(_table(group, against) for _, group in groups)
        for prefix, heading in _BUDGETS.items():
            kinds = members[members["metric"].str.startswith(prefix)]
            for (batch, seq), group in kinds.groupby(["batch", "seq"], sort=False):
                parts.append(_step_budget(group, f"{heading}, {_size(batch, seq).lower()}, ms (share)", prefix))
        unavailable = _records(members[members["metric"] == "method"])
        missing = [f"- `{row.method}` was not available: {row.note}" for row in unavailable]
        parts.extend([*missing, ""] if missing else [])
    return "\n".join(parts)


def summary_tables(rows: pd.DataFrame, baselines: Sequence[str]) -> str:
    """Median ratios, round by round: a column per metric and number of tokens, in it the ratio to each baseline."""
    parts = []
    for title, members in by_setting(rows[rows["variant"] == "eager"]):
        members = members[members["metric"].isin(_SUMMARY)]
        compared = members[members["method"].isin(baselines)]
        header: dict[tuple[str, int], str] = {}
        for metric, name in _SUMMARY.items():
            lengths = sorted(members.loc[members["metric"] == metric, "seq"].unique())
            once = metric in _SAME_AT_ALL_LENGTHS
            for seq in lengths[-1:] if once else lengths:
                if seq in set(compared.loc[compared["metric"] == metric, "seq"]):
                    header[metric, seq] = name if once or not seq else f"{name}, {seq} tokens"
        if not header:
            continue
        cells = {(row.method, row.metric, row.seq): row for row in _records(members)}
        lines = []
        methods = members["method"].unique()
        for method in sorted(methods, key=lambda name: name not in baselines):
            line = [f"`{method}`"]
            for column in header:
                row = cells.get((method, *column))
                ratios = [_ratio(ratios_to(row, name), short=True) for name in baselines]
                line.append(" / ".join(ratio or "–" for ratio in ratios) if any(ratios) else "")
            lines.append(line)
        against = " / ".join(f"× `{baseline}`" for baseline in baselines)
        parts.append("\n".join([f"**{title}** ({against})", "", *_markdown(["", *header.values()], lines), ""]))
    return "\n".join(parts)


def _records(rows: pd.DataFrame) -> list[Any]:
    return list(rows.itertuples(index=False, name="Row"))


def _title(row: Any) -> str:
    layers = "1 layer" if row.layers == 1 else f"{row.layers} layers"
    size = f"{layers} of width {row.hidden}" if row.layers else f"{row.image_size} pixels"
    what = row.model + " blocks" * (row.scope == "blocks") + " with the fused loss" * (row.loss == "fused")
    where = row.device
    if row.device == "cpu":
        where = f"{row.machine.split(',')[0]} with {row.threads} thread{'' if row.threads == '1' else 's'}"
    return f"{what}, {size}, {row.dtype}, r = {row.rank}, {where}"


def _size(batch: int, seq: int, budget: int = 0) -> str:
    if budget:
        fixed = f"batch {batch}" if batch else (f"{seq} tokens" if seq else "images")
        return f"Within {format_bytes(budget)}, {fixed}"
    return f"Batch {batch}, {seq} tokens" if seq else f"Batch {batch}"


def _table(group: pd.DataFrame, baselines: Sequence[str]) -> str:
    rows = _records(group)
    metrics = [name for name in METRICS if name in set(group["metric"])]
    cells = {(row.method, row.variant, row.metric): row for row in rows}
    header = ["method", "trained"]
    for name in metrics:
        header.append(METRICS[name][0])
        header.extend(f"× {baseline}" for baseline in baselines if name in _COMPARED)
    lines = []
    for method, variant in dict.fromkeys((row.method, row.variant) for row in rows):
        trainable = next(row.trainable for row in rows if row.method == method)
        line = [f"`{method}`" + ("" if variant == "eager" else f" {variant}"), f"{trainable:,}"]
        for name in metrics:
            row = cells.get((method, variant, name))
            line.append(_value(row))
            if name in _COMPARED:
                line.extend(_ratio(ratios_to(row, base)) for base in baselines)
        lines.append(line)
    notes = [_NOISY_NOTE] if any(cell.endswith(" noisy") for line in lines for cell in line) else []
    notes += [f"`{row.method}`: {row.metric.replace('_', ' ')}: {row.note}" for row in rows if row.status == "failed"]
    below = ["", *(f"- {note}" for note in notes), *([""] if notes else [])]
    return "\n".join([f"**{_size(rows[0].batch, rows[0].seq, rows[0].budget)}**\n", *_markdown(header, lines), *below])


def _value(row: Any) -> str:
    if row is None:
        return ""
    if not row.samples:
        return "–"
    show = METRICS[row.metric][1]
    return show(row.median) + (f" ({show(row.q1)}–{show(row.q3)})" if len(row.samples) > 1 else "")


def _ratio(ratios: Sequence[float], short: bool = False) -> str:
    if not ratios:
        return ""
    found = spread(ratios)
    if short:
        return f"{found.median:.2f}{' (noisy)' if found.noisy else ''}"
    if len(ratios) == 1:
        return f"{found.median:.3f}"
    return f"{found.median:.3f} ({found.q1:.3f}–{found.q3:.3f}){' noisy' if found.noisy else ''}"


def _step_budget(group: pd.DataFrame, title: str, prefix: str) -> str:
    """Phases or kinds by method, in milliseconds and shares of the step."""
    values = group.pivot_table(index="metric", columns="method", values="median", sort=False)
    values = values[group["method"].unique()]
    shown = (values * 1e3).map("{:.2f}".format) + (values / values.sum()).map(" ({:.1%})".format)
    shown = shown.where(values.notna(), "")
    lines = [[str(metric).removeprefix(prefix), *cells] for metric, *cells in shown.itertuples()]
    return "\n".join([f"**{title}**\n", *_markdown(["", *(f"`{method}`" for method in values)], lines), ""])


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def replace_block(path: Path, content: str) -> None:
    """Put `content` between the markers of the file; PacaError unless it has each of them once and in order."""
    if not path.is_file():
        raise PacaError(f"There is no file {str(path)!r} to put the table into.")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PacaError(f"{str(path)!r} needs one line {BEGIN} and, below it, one line {END}: the table goes between.")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(f"{head}\n{content.strip()}\n{tail}", encoding="utf-8")

"""Rows as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paca.bench.rows import Row
from paca.bench.statistics import round_ratios, spread
from paca.messages.units import format_bytes


class Setting(NamedTuple):
    """What the rows of one table have in common."""

    model: str
    scope: str
    loss: str
    dtype: str
    layers: int
    hidden: int
    vocab: int
    image_size: int
    rank: int
    optimizer: str
    device: str
    machine: str
    threads: str

    def title(self) -> str:
        """One line of words."""
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        size = f"{layers} of width {self.hidden}" if self.layers else f"{self.image_size} pixels"
        what = f"{self.model} blocks" if self.scope == "blocks" else self.model
        if self.loss == "fused":
            what += " with the fused loss"
        where = (
            f"{self.machine.split(',')[0]} with {self.threads} thread{'' if self.threads == '1' else 's'}"
            if self.device == "cpu"
            else self.device
        )
        return f"{what}, {size}, {self.dtype}, r = {self.rank}, {where}"


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    title: str
    show: Callable[[float], str]


METRICS = {
    "step_time": Metric("step, ms", lambda value: f"{value * 1e3:.1f}"),
    "throughput": Metric("tokens/s", lambda value: f"{value:,.0f}"),
    "saved_per_token_and_layer": Metric("saved bytes per token and layer", lambda value: f"{value:,.0f}"),
    "saved_units_per_layer": Metric("in hidden states", lambda value: f"{value:.1f}"),
    "saved": Metric("saved activations", format_bytes),
    "peak_above_weights": Metric("peak above the weights", format_bytes),
    "peak_memory": Metric("peak memory", format_bytes),
    "longest_sequence": Metric("longest sequence", lambda value: f"{value:,.0f}"),
    "largest_batch": Metric("largest batch", lambda value: f"{value:,.0f}"),
    "switch_time": Metric("switch of adapters, ms", lambda value: f"{value * 1e3:.2f}"),
    "recompilations": Metric("recompilations over the rounds", lambda value: f"{value:.0f}"),
    "recompilations: first_switch": Metric("graphs at the first switch", lambda value: f"{value:.0f}"),
    "recompilations: switch_back": Metric("graphs when switching back and forth", lambda value: f"{value:.0f}"),
}
_NOISY = " noisy"
_NOISY_NOTE = (
    "noisy: the middle half of the rounds differs by more than a quarter, so the ratio decides nothing; measure on a "
    "quieter machine, or with more --rounds"
)
_COMPARED = (
    "step_time",
    "saved_per_token_and_layer",
    "saved",
    "peak_above_weights",
    "longest_sequence",
    "largest_batch",
)


def setting_of(row: Row) -> Setting:
    """The part of a row that its table's title shows."""
    return Setting(*(getattr(row, name) for name in Setting._fields))


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows that measured the same thing, the last one."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (setting_of(row), row.batch, row.seq, row.budget, row.method, row.variant, row.metric)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def ratios_to(row: Row, baseline: Row | None) -> list[float]:
    """The row's samples over the baseline's, round by round; empty unless one run measured both."""
    if baseline is None or baseline.run != row.run or len(baseline.samples) != len(row.samples):
        return []
    if any(value <= 0 for value in baseline.samples):
        return []
    return round_ratios(row.samples, baseline.samples)


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """The rows of each table, in the order of their first appearance."""
    found: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        found[setting_of(row)].append(row)
    return dict(found)


def tables(rows: Iterable[Row], baselines: Sequence[str] = ()) -> str:
    """All rows as Markdown: a heading per setting, a table per size of batch.

    Args:
        rows: from any number of runs; of rows that measured the same thing the last one is shown.
        baselines: methods to show ratios against; by default the ones that the runs named.
    """
    parts = []
    for setting, members in by_setting(newest(rows)).items():
        parts.append(f"### {setting.title()}\n")
        against = list(baselines) or list(dict.fromkeys(row.baseline for row in members if row.baseline))
        for (batch, seq, budget), group in _grouped(members).items():
            parts.append(_table(_size_title(batch, seq, budget), group, against))
        parts.extend(_step_budgets(members))
        missing = [row for row in members if row.metric == "method"]
        parts.extend(f"- `{row.method}` was not available: {row.note}" for row in missing)
        if missing:
            parts.append("")
    return "\n".join(parts)


def _grouped(rows: Iterable[Row]) -> dict[tuple[int, int, int], list[Row]]:
    found: dict[tuple[int, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.metric in METRICS:
            found[row.batch, row.seq, row.budget].append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][2] > 0, item[0])))


def _size_title(batch: int, seq: int, budget: int) -> str:
    if budget:
        fixed = f"batch {batch}" if batch else (f"{seq} tokens" if seq else "images")
        return f"Within {format_bytes(budget)}, {fixed}"
    return f"Batch {batch}, {seq} tokens" if seq else f"Batch {batch}"


def _table(title: str, rows: list[Row], baselines: Sequence[str]) -> str:
    metrics = [name for name in METRICS if any(row.metric == name for row in rows)]
    cells = {(row.method, row.variant, row.metric): row for row in rows}
    methods = list(dict.fromkeys((row.method, row.variant) for row in rows))
    header = ["method", "trained"]
    for name in metrics:
        header.append(METRICS[name].title)
        header.extend(f"× {baseline}" for baseline in baselines if name in _COMPARED)
    lines = [f"**{title}**\n", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for method, variant in methods:
        trainable = next(row.trainable for row in rows if row.method == method)
        line = [f"`{method}`" + ("" if variant == "eager" else f" {variant}"), f"{trainable:,}"]
        for name in metrics:
            row = cells.get((method, variant, name))
            line.append(_value(row))
            if name in _COMPARED:
                line.extend(_ratio(row, cells.get((baseline, variant, name))) for baseline in baselines)
        lines.append(_line(line))
    noisy = any(line.count(_NOISY) for line in lines[3:])
    notes = [_NOISY_NOTE] if noisy else []
    notes += [f"`{row.method}`: {row.metric.replace('_', ' ')}: {row.note}" for row in rows if row.status == "failed"]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), *([""] if notes else [])])


def _value(row: Row | None) -> str:
    if row is None:
        return ""
    if row.median is None or row.q1 is None or row.q3 is None:
        return "–"
    show = METRICS[row.metric].show
    text = show(row.median)
    return f"{text} ({show(row.q1)}–{show(row.q3)})" if len(row.samples) > 1 else text


def _ratio(row: Row | None, baseline: Row | None) -> str:
    ratios = ratios_to(row, baseline) if row is not None else []
    if not ratios:
        return ""
    found = spread(ratios)
    if len(ratios) == 1:
        return f"{found.median:.3f}"
    return f"{found.median:.3f} ({found.q1:.3f}–{found.q3:.3f}){_NOISY if found.noisy else ''}"


def _step_budgets(rows: list[Row]) -> list[str]:
    """Tables of phases and kinds, in milliseconds and shares of the step."""
    parts = []
    for prefix, title in (("phase: ", "Phases of a step"), ("kind: ", "Kinds of work in a step, under the profiler")):
        groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in rows:
            if row.metric.startswith(prefix):
                groups[row.batch, row.seq].append(row)
        for (batch, seq), group in groups.items():
            methods = list(dict.fromkeys(row.method for row in group))
            values = {(row.metric, row.method): row.median or 0.0 for row in group}
            totals = {m: sum(value for (_, method), value in values.items() if method == m) for m in methods}
            lines = [
                f"**{title}, {_size_title(batch, seq, 0).lower()}, ms (share)**\n",
                _line(["", *(f"`{method}`" for method in methods)]),
                _line(["---", *["---:"] * len(methods)]),
            ]
            for metric in dict.fromkeys(row.metric for row in group):
                shown = [
                    f"{values[metric, method] * 1e3:.2f} ({values[metric, method] / totals[method]:.1%})"
                    if totals[method] and (metric, method) in values
                    else ""
                    for method in methods
                ]
                lines.append(_line([metric.removeprefix(prefix), *shown]))
            parts.append("\n".join([*lines, ""]))
    return parts


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

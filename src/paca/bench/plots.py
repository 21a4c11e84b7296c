"""Rows as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from paca.bench.report import METRICS, by_setting, ratios_to
from paca.bench.rows import spread

_FAMILIES = (("frozen", "#8a8f98"), ("full", "#5b5f66"), ("qpaca", "#0b7a75"), ("paca", "#12908a"))
_OTHERS = "#d9822b"
_PANELS = (
    ("step_time", "Step time"),
    ("saved_per_token_and_layer", "Saved activations per token and layer"),
    ("saved", "Saved activations"),
    ("peak_above_weights", "Peak memory above the weights"),
    ("longest_sequence", "Longest sequence within {budget}"),
    ("largest_batch", "Largest batch within {budget}"),
)
_MORE_IS_BETTER = ("longest_sequence", "largest_batch")


def write_plots(rows: pd.DataFrame, folder: Path, name: str, baseline: str | None = None) -> list[Path]:
    """Draw every setting: bars against the baseline, and where several lengths were timed, throughput over length.

    Args:
        rows: From any number of runs.
        folder: Where the PNG files go.
        name: The beginning of their names.
        baseline: The method that is 1; by default the one that the runs named.

    Returns:
        The files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    settings = list(by_setting(rows))
    for number, (title, frame) in enumerate(settings, start=1):
        suffix = f"-{number}" if len(settings) > 1 else ""
        members = list(frame.itertuples(index=False, name="Row"))
        for kind, figure in (("", _bars(title, members, baseline)), ("-throughput", _throughput(title, members))):
            if figure is None:
                continue
            path = folder / f"{name}{suffix}{kind}.png"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
            written.append(path)
    return written


def _color(method: str) -> str:
    return next((color for start, color in _FAMILIES if method.startswith(start)), _OTHERS)


def _label(row: Any) -> str:
    return row.method if row.variant == "eager" else f"{row.method}, {row.variant}"


def _bars(heading: str, rows: list[Any], baseline: str | None) -> Any:
    """One panel per metric that has values, at the largest size that was measured."""
    panels = [(title, chosen) for metric, title in _PANELS if (chosen := _largest(rows, metric))]
    if any(title == "Saved activations per token and layer" for title, _ in panels):
        panels = [panel for panel in panels if panel[0] != "Saved activations"]
    if not panels:
        return None
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(_label(row) for _, chosen in panels for row in chosen))
    figure = Figure(figsize=(2.2 + 3.3 * len(panels), 1.6 + 0.36 * len(labels)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, chosen) in zip(axes, panels, strict=True):
        _bar_panel(axis, title, chosen, labels, baseline)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color="#444444")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _bar_panel(axis: Any, title: str, rows: list[Any], labels: Sequence[str], baseline: str | None) -> None:
    first = rows[0]
    name = baseline or first.baseline or rows[0].method
    by_method = {(row.method, row.variant): row for row in rows}
    for row in rows:
        ratios = ratios_to(row, by_method.get((name, row.variant)))
        if not ratios:
            continue
        found, place = spread(ratios), labels.index(_label(row))
        axis.barh(
            place, found.median, color=_color(row.method), height=0.68, alpha=1 if row.variant == "eager" else 0.6
        )
        if len(ratios) > 1:
            axis.plot([found.q1, found.q3], [place, place], color="#222222", linewidth=1.4, solid_capstyle="butt")
        shown = METRICS[row.metric][1](row.median)
        text = f"{found.median:.2f}×" + (f"  {shown}" if row.metric in _MORE_IS_BETTER else "")
        # On white, above the line at 1, which would else run through the numbers of the bars that end before it.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        end = max(found.median, found.q3)
        axis.annotate(
            text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5, color="#222222",
            bbox=box, zorder=4,
        )  # fmt: skip
    axis.axvline(1, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_xlim(0, max(axis.get_xlim()[1], 1) * (1.3 if first.metric in _MORE_IS_BETTER else 1.2))
    better = "longer is better" if first.metric in _MORE_IS_BETTER else "shorter is better"
    heading = title.format(budget=f"{first.budget / 2**20:,.0f} MiB")
    axis.set_title(f"{heading}\n", fontsize=10.5, loc="left", pad=4)
    size = f"{first.seq} tokens, " if first.seq else ""
    axis.text(0, 1.015, f"{size}× {name}, {better}", transform=axis.transAxes, fontsize=8.5, color="#666666")
    _bare(axis)
    axis.tick_params(axis="y", length=0)


def _largest(rows: list[Any], metric: str) -> list[Any]:
    """The rows of the metric at the largest size (for a search: the largest budget) that has any."""
    found = [row for row in rows if row.metric == metric and row.samples]
    if not found:
        return []
    size = max((row.budget, row.seq * row.batch, row.batch, row.seq) for row in found)
    return [row for row in found if (row.budget, row.seq * row.batch, row.batch, row.seq) == size]


def _throughput(heading: str, rows: list[Any]) -> Any:
    """Tokens per second over the sequence length, for the smallest batch; None with fewer than two lengths."""
    found = [row for row in rows if row.metric == "throughput" and row.samples and row.seq]
    if not found:
        return None
    batch = min(row.batch for row in found)
    found = [row for row in found if row.batch == batch]
    lengths = sorted({row.seq for row in found})
    if len(lengths) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    for count, label in enumerate(dict.fromkeys(_label(row) for row in found)):
        line = sorted((row for row in found if _label(row) == label), key=lambda row: row.seq)
        axis.errorbar(
            [row.seq for row in line],
            [row.median for row in line],
            yerr=[[row.median - row.q1 for row in line], [row.q3 - row.median for row in line]],
            label=label,
            color=_color(line[0].method),
            marker="osD^vPX*"[count % 8],
            markersize=5,
            linewidth=1.6,
            linestyle="-" if line[0].variant == "eager" else "--",
            capsize=2,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens in a sequence")
    axis.set_ylabel("tokens per second")
    axis.legend(fontsize=8.5, frameon=False)
    axis.set_title(heading, fontsize=9, loc="left", color="#444444")
    axis.grid(axis="y", color="#e6e6e6")
    _bare(axis)
    return figure


def _bare(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_axisbelow(True)

"""Rows as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from paca.bench.report import METRICS, by_setting, ratios_to
from paca.bench.rows import spread

_FAMILIES = (("frozen", "#8a8f98"), ("full", "#5b5f66"), ("qpaca", "#0b7a75"), ("paca", "#12908a"), ("", "#d9822b"))
_PANELS = {
    "step_time": "Step time",
    "saved_per_token_and_layer": "Saved activations per token and layer",
    "saved": "Saved activations",
    "peak_above_weights": "Peak memory above the weights",
    "longest_sequence": "Longest sequence within {budget}",
    "largest_batch": "Largest batch within {budget}",
}
_MORE_IS_BETTER = ("longest_sequence", "largest_batch")


def write_plots(rows: pd.DataFrame, folder: Path, name: str, baseline: str | None = None) -> list[Path]:
    """Draw every setting: bars against the baseline, and where several lengths were timed, throughput over length.

    Args:
        rows: From any number of runs.
        folder: Where the PNG files go.
        name: The beginning of their names.
        baseline: The method that is 1; by default the one that the runs named.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    settings = list(by_setting(rows))
    for number, (title, frame) in enumerate(settings, start=1):
        suffix = f"-{number}" if len(settings) > 1 else ""
        eager = frame["variant"] == "eager"
        frame = frame.assign(label=frame["method"].where(eager, frame["method"] + ", " + frame["variant"]))
        frame = frame[frame["samples"].map(len) > 0]
        for kind, figure in (("", _bars(title, frame, baseline)), ("-throughput", _throughput(title, frame))):
            if figure is None:
                continue
            path = folder / f"{name}{suffix}{kind}.png"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
            written.append(path)
    return written


def _color(method: str) -> str:
    return next(color for start, color in _FAMILIES if method.startswith(start))


def _bars(heading: str, rows: pd.DataFrame, baseline: str | None) -> Any:
    """One panel per metric that has values, at the largest size (for a search: the largest budget) that has any."""
    panels = {}
    for metric in _PANELS:
        found = rows[rows["metric"] == metric]
        found = found.assign(tokens=found["batch"] * found["seq"])
        size = found[["budget", "tokens", "batch", "seq"]]
        if len(found) and not (metric == "saved" and "saved_per_token_and_layer" in panels):
            largest = size.sort_values(list(size)).iloc[-1]
            panels[metric] = list(found[(size == largest).all(axis=1)].itertuples(index=False))
    if not panels:
        return None
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row.label for chosen in panels.values() for row in chosen))
    figure = Figure(figsize=(2.2 + 3.3 * len(panels), 1.6 + 0.36 * len(labels)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (metric, chosen) in zip(axes, panels.items(), strict=True):
        _bar_panel(axis, metric, chosen, labels, baseline or chosen[0].baseline or chosen[0].method)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color="#444444")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _bar_panel(axis: Any, metric: str, rows: list[Any], labels: list[str], baseline: str) -> None:
    more = metric in _MORE_IS_BETTER
    for row in rows:
        ratios = ratios_to(row, baseline)
        if not ratios:
            continue
        found, place = spread(ratios), labels.index(row.label)
        alpha = 1 if row.variant == "eager" else 0.6
        axis.barh(place, found.median, color=_color(row.method), height=0.68, alpha=alpha)
        if len(ratios) > 1:
            axis.plot([found.q1, found.q3], [place, place], color="#222222", linewidth=1.4, solid_capstyle="butt")
        text = f"{found.median:.2f}×" + (f"  {METRICS[metric][1](row.median)}" if more else "")
        # On white, above the line at 1, which would else run through the numbers of the bars that end before it.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        shown: Any = {"va": "center", "fontsize": 8.5, "color": "#222222", "bbox": box, "zorder": 4}
        axis.annotate(text, (max(found.median, found.q3), place), (5, 0), textcoords="offset points", **shown)
    axis.axvline(1, color="#444444", linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_xlim(0, max(axis.get_xlim()[1], 1) * (1.3 if more else 1.2))
    heading = _PANELS[metric].format(budget=f"{rows[0].budget / 2**20:,.0f} MiB")
    axis.set_title(f"{heading}\n", fontsize=10.5, loc="left", pad=4)
    size = f"{rows[0].seq} tokens, " if rows[0].seq else ""
    below = f"{size}× {baseline}, {'longer' if more else 'shorter'} is better"
    axis.text(0, 1.015, below, transform=axis.transAxes, fontsize=8.5, color="#666666")
    _bare(axis)
    axis.tick_params(axis="y", length=0)


def _throughput(heading: str, rows: pd.DataFrame) -> Any:
    """Tokens per second over the sequence length, for the smallest batch; None with fewer than two lengths."""
    found = rows[(rows["metric"] == "throughput") & (rows["seq"] > 0)]
    found = found[found["batch"] == found["batch"].min()]
    lengths = sorted(found["seq"].unique())
    if len(lengths) < 2:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    for marker, (label, line) in zip("osD^vPX*" * len(found), found.groupby("label", sort=False), strict=False):
        line, eager = line.sort_values("seq"), line["variant"].iloc[0] == "eager"
        axis.errorbar(
            line["seq"], line["median"], yerr=[line["median"] - line["q1"], line["q3"] - line["median"]], label=label,
            color=_color(str(label)), marker=marker, markersize=5, linewidth=1.6, linestyle="-" if eager else "--",
            capsize=2,
        )  # fmt: skip
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
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)

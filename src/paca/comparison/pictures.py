"""The pictures of a comparison: score against what it cost, score over the rates, loss over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paca.comparison.comparable import at
from paca.comparison.method_result import MethodResult
from paca.comparison.results import ComparisonResult
from paca.comparison.statistics import pareto
from paca.training.reporting.curves import INK, figure_with_axes, inline_svg, thin

COLORS = ("#0b84a5", "#e8702a", "#6f4e9c", "#3f9c5a", "#c8432f", "#8a6d3b", "#d16ba5", "#7a7f87")
"""By the order of methods; told apart by colour-blind eyes as well, together with the markers."""
_MARKERS = "osD^vPX*"
_LEAST_RANGE = 0.05
"""An axis of cost goes at least so far to both sides of its middle: what took nearly the same is drawn near."""

Curve = Sequence[tuple[float, float]]


def score_against(result: ComparisonResult, path: tuple[str, ...], across: str, unit: float = 1.0) -> str:
    """Each method's score against what it took, its seeds around it, and the Pareto front through the means.

    Args:
        result: The methods.
        path: Where the cost is in a row.
        across: What it is, with its unit.
        unit: What a row's number is divided by.

    Returns:
        An `<svg>` element.
    """
    figure, axes = figure_with_axes(4.4, 3.4, across)
    means = []
    for number, method in enumerate(result.methods):
        cost, score = method.mean(*path), method.score
        if cost is None or score is None:
            continue
        means.append((cost / unit, score.mean))
        style: dict[str, Any] = {"color": _color(number), "marker": _marker(number), "linestyle": "none"}
        seeds = [(at(row, path) / unit, row["score"]) for row in method.rows]
        axes.plot(*zip(*seeds, strict=True), alpha=0.35, markersize=4, **style)
        axes.errorbar(*means[-1], yerr=score.half, capsize=3, markersize=8, label=method.name, **style)
    sign = 1 if result.lower_is_better else -1
    front = sorted(means[index] for index in pareto([(cost, sign * score) for cost, score in means]))
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=INK, alpha=0.5, linewidth=1, linestyle="--", label="Pareto front")
    axes.set_ylabel(_score_label(result))
    axes.margins(0.15)
    low, high = axes.get_xlim()
    middle = (low + high) / 2
    half = max((high - low) / 2, _LEAST_RANGE * abs(middle))
    axes.set_xlim(middle - half, middle + half)
    axes.locator_params(axis="x", nbins=5)  # more labels of five digits touch each other
    _legend(axes, means)
    return inline_svg(figure, f"{result.metric} of each method against {across}")


def score_over_rates(result: ComparisonResult) -> str:
    """The score of each rate that was tried, by the first seed, as an `<svg>` element."""
    figure, axes = figure_with_axes(4.4, 3.4, "learning rate")
    drawn = []
    for number, method in enumerate(result.methods):
        seeds = [row["seed"] for row in method.tried[:1]]
        points = sorted(
            (row["learning_rate"], row["score"])
            for row in method.tried
            if row["seed"] in seeds and row["score"] is not None and row["learning_rate"] is not None
        )
        if points:
            drawn += points
            axes.plot(*zip(*points, strict=True), color=_color(number), marker=_marker(number), label=method.name)
    if drawn:
        axes.set_xscale("log")
    axes.set_ylabel(_score_label(result))
    _legend(axes, drawn)
    return inline_svg(figure, f"{result.metric} of each method over the learning rates that were tried")


def loss_over_time(curves: Sequence[tuple[MethodResult, Curve, Curve]]) -> str:
    """Held-out loss, and faintly the training loss, over the seconds spent in training.

    Args:
        curves: For each method (seconds, loss) in training and on held-out data.

    Returns:
        An `<svg>` element.
    """
    figure, axes = figure_with_axes(9.0, 3.8, "seconds of training")
    for number, (method, train, held_out) in enumerate(curves):
        if train:
            axes.plot(*zip(*thin(train), strict=True), color=_color(number), alpha=0.3, linewidth=1)
        if held_out:
            style = {"color": _color(number), "marker": _marker(number), "markersize": 5, "linewidth": 2}
            axes.plot(*zip(*held_out, strict=True), label=method.name, **style)
    axes.set_ylabel("loss (nats per token)")
    _legend(axes, [curve for _, *both in curves for curve in both if curve])
    return inline_svg(figure, "Held-out loss of each method over the seconds of its training")


def _legend(axes: Any, drawn: Sequence[Any]) -> None:
    if drawn:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def _score_label(result: ComparisonResult) -> str:
    return f"{'held-out loss' if result.metric == 'loss' else result.metric} ({result.good_sign})"


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]

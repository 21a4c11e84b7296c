"""The pictures of the report: curves over steps, drawn by matplotlib as inline SVG that follows the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#123456"
"""Stands for the text colour of the page; replaced by currentColor in the SVG."""
_TRAIN = "#3b82f6"  # blue and orange: distinct to colour-blind eyes, and on white as on black
_HELD_OUT = "#f97316"
_MOST_POINTS = 800  # of one curve; more only make the page heavy
_WINDOWS = 25  # the smoothed curve averages over a 25th of the run

Points = Sequence[tuple[float, float]]


def loss_curves(train: Points, held_out: Points, unit: str | None = "nats per token") -> str:
    """The training loss (as logged, and smoothed) and the held-out loss.

    Args:
        train: (step, loss) of the logged steps.
        held_out: (step, loss) of the evaluations; may be empty.
        unit: Of the loss, where it has one that people know.

    Returns:
        An `<svg>` element.
    """
    figure, axes = figure_with_axes(9.0, 3.8)
    if train:
        thinned = thin(train)
        axes.plot(*zip(*thinned, strict=True), color=_TRAIN, alpha=0.3, linewidth=1)
        smooth = thin(smoothed(train))
        axes.plot(*zip(*smooth, strict=True), color=_TRAIN, linewidth=2, label="training")
        _mark_single(axes, train, _TRAIN)
    if held_out:
        # Two points are before and after: a line between them would tell of steps that nobody measured.
        line = "-" if len(held_out) > 2 else "none"
        style: dict[str, Any] = {"linestyle": line, "linewidth": 2, "marker": "o", "markersize": 6, "clip_on": False}
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, label="held out", zorder=4, **style)
        first, last = held_out[0], held_out[-1]
        for step, loss in {first, last}:
            place = {"textcoords": "offset points", "xytext": (0, 9), "ha": "right" if step == last[0] else "left"}
            axes.annotate(
                f"{loss:.3f}", (step, loss), color=_HELD_OUT, fontsize=10, fontweight="bold", zorder=5, **place
            )
    _end_at_last_step(axes, [*train, *held_out])
    axes.set_ylabel("loss" if unit is None else f"loss ({unit})")
    if train or held_out:
        axes.legend(frameon=False, labelcolor=INK)
    return inline_svg(figure, "Training loss and held-out loss over steps")


def curve(points: Points, title: str, *, held_out: Points = (), from_zero: bool = False) -> str:
    """One quantity over steps.

    Args:
        points: (step, value); may be empty.
        title: Stands above the curve.
        held_out: The same quantity at the evaluations, where there are any.
        from_zero: Let the vertical axis begin at zero.

    Returns:
        An `<svg>` element.
    """
    figure, axes = figure_with_axes(4.4, 2.5)
    if points:
        axes.plot(*zip(*thin(points), strict=True), color=_TRAIN, linewidth=1.5)
        _mark_single(axes, points, _TRAIN)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", markersize=3, label="held out")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    _end_at_last_step(axes, [*points, *held_out])
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    return inline_svg(figure, f"{title} over steps")


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The running mean over the last 25th of the run at each point (at least one point, so short runs stay as is)."""
    steps, values = zip(*points, strict=True)
    means = pd.Series(values).rolling(max(1, len(points) // _WINDOWS), min_periods=1).mean()
    return list(zip(steps, map(float, means), strict=True))


def thin(points: Points) -> list[tuple[float, float]]:
    """At most about 800 points, spread evenly, the first and the last among them."""
    stride = max(1, math.ceil(len(points) / _MOST_POINTS))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def figure_with_axes(width: float, height: float, across: str = "step") -> tuple[Figure, Any]:
    """An empty figure in the style of all pictures, in inches, and its axes; `across` names the horizontal one."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.15)
    axes.set_xlabel(across, color=INK)
    axes.yaxis.label.set_color(INK)
    if across == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _end_at_last_step(axes: Any, points: Points) -> None:
    steps = [step for step, _ in points]
    if steps and min(steps) < max(steps):
        axes.set_xlim(min(steps), max(steps))


def _mark_single(axes: Any, points: Points, color: str) -> None:
    if len(points) == 1:  # a line of one point is invisible
        axes.plot(*points[0], marker="o", color=color)


def inline_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element; `description` is what it shows, for who can't see it."""
    buffer = io.StringIO()
    # The salt keeps the ids of several pictures in one page apart, and the same from run to run.
    with matplotlib.rc_context({"svg.hashsalt": description, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)

"""The pictures of a comparison."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.result_maker import result
from paca.comparison import pictures


def axis_of(
    costs: tuple[float, float], unit: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[tuple[float, float]]]:
    """Of what two methods took: the axes, and where each label of the horizontal one begins and ends."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "inline_svg", lambda figure, _: drawn.append(figure))
    found = result({"paca": {0: 1.0, 1: 1.1}, "lora": {0: 1.2, 1: 1.3}})
    for method, cost in zip(found.methods, costs, strict=True):
        for row in method.rows:
            row["train_info"]["train_time"] = cost * unit
    pictures.score_against(found, ("train_info", "train_time"), "seconds of training", unit)
    [figure] = drawn
    FigureCanvasAgg(figure).draw()
    [axes] = figure.axes
    low, high = axes.get_xlim()
    labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    return axes, [(box.x0, box.x1) for box in (label.get_window_extent() for label in labels)]


@pytest.mark.parametrize("unit", [1.0, 2**30])
@pytest.mark.parametrize(
    "costs",
    [(0.66340, 0.66450), (0.6635, 0.6635), (0.2, 0.2001), (3.214, 3.215), (12_345.0, 12_400.0), (9.7, 34.2)],
)
def test_the_labels_of_what_methods_took_do_not_overlap(
    costs: tuple[float, float], unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes, labels = axis_of(costs, unit, monkeypatch)
    assert len(labels) >= 3
    for (_, end), (start, _) in itertools.pairwise(sorted(labels)):
        assert start - end > 4, [label.get_text() for label in axes.get_xticklabels()]
    assert axes.xaxis.get_offset_text().get_text() == ""


def test_what_took_nearly_the_same_is_drawn_near_and_what_differs_fills_the_axis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes, _ = axis_of((0.6635, 0.6640), 1.0, monkeypatch)
    assert axes.get_xlim() == pytest.approx((0.66375 * 0.95, 0.66375 * 1.05))
    axes, _ = axis_of((1.0, 2.0), 1.0, monkeypatch)
    assert axes.get_xlim() == pytest.approx((0.85, 2.15))

"""The held-out data as a task: scores of the model before and after training, and how a report shows them.

How an answer is scored is not known here: `paca.evaluation.own_data.scorer` makes the function.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any, Protocol


class Scorer(Protocol):
    """Scores a model on rows of `paca.data.Examples`."""

    def check(self, rows: Iterable[dict[str, Any]], model: Any) -> None:
        """Refuse rows that cannot be scored, and answers that `model` (its weights may be missing) has no room for,
        before anything is trained."""

    def score(self, model: Any, tokenizer: Any, rows: Iterable[dict[str, Any]], when: str) -> dict[str, Any]:
        """A value and `..._stderr` for each metric, `examples` and `samples`; `when` tells people which model it is."""


def trainers_scores(
    metric: str, examples: int, before: float | None, after: float | None, right: str = ""
) -> dict[str, Any]:
    """What a trainer measured on held-out data itself, in the form of a `Scorer`'s.

    Args:
        metric: Its name, such as `accuracy`.
        examples: How many were measured.
        before: The value before training, where it was measured.
        after: And after.
        right: 1 or 0 for each example after training; empty where that is not known.
    """
    found: dict[str, Any] = {}
    for name, value in (("before", before), ("after", after)):
        if value is not None:
            is_share = metric.endswith(("accuracy", "accuracies"))
            error = math.sqrt(value * (1 - value) / (examples - 1)) if is_share and examples > 1 else None
            found[name] = {metric: value, f"{metric}_stderr": error, "examples": examples, "samples": []}
    if right and after is not None and math.isclose(right.count("1") / len(right), after, abs_tol=1e-6):
        found["after"]["right"] = right
    return found


def score_lines(scores: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Each metric and its value, before → after, as text."""
    sides = [side for side in (scores or {}).values() if side]
    names = [name for name in sides[0] if f"{name}_stderr" in sides[0]] if sides else []
    return [(name.replace("_", " "), " → ".join(_with_error(side, name) for side in sides)) for name in names]


def sample_table(scores: dict[str, Any] | None) -> str:
    """Questions and their answers before and after, as a part of an HTML page; empty where there are none."""
    sides = {name: side["samples"] for name, side in (scores or {}).items()}
    samples = list(zip(*sides.values(), strict=True))
    if not samples:
        return ""
    heads = "".join(f"<th>{head}</th>" for head in ("question", "reference", *sides))
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(text)}</td>"
            for text in (row[0]["question"], row[0]["reference"], *(one["answer"] for one in row))
        )
        + "</tr>"
        for row in samples
    )
    return f'<h2>Answers</h2>\n<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>'


def _with_error(side: dict[str, Any], name: str) -> str:
    error = side[f"{name}_stderr"]
    if error == 0:  # of a sample without spread, which tells none
        return f"{side[name]:.4f} (all {side['examples']:,} alike)"
    return f"{side[name]:.4f}" if error is None else f"{side[name]:.4f} ± {error:.4f}"

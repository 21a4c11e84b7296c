"""Results of base and adapter beside each other: by task and group, with standard errors, also of the difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from paca.evaluation.sides import ADAPTER, BASE, MODEL
from paca.evaluation.statistics import Mean, mean_with_error, share_may_be_off


@dataclass(frozen=True)
class Row:
    """One metric of one task or group."""

    task: str
    depth: int
    """How many groups it lies in."""
    metric: str
    """With the filter behind a comma, where there is one: `exact_match,strict-match`."""
    values: dict[str, Mean]
    """For `base` and `adapter`, or for `model`."""
    difference: Mean | None
    """Adapter less base. Its error comes from the differences question by question, since both answer the same ones."""
    questions: int | None = None
    """How many were asked, where that is known."""
    of_tokens: bool = False
    """Whether it is over the tokens of the answers, not over the questions."""


def rows_of(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Every metric of every task, groups before their members.

    Args:
        results: From `paca.evaluation.harness.evaluate_tasks`.
    """
    shown = results[ADAPTER if ADAPTER in results else MODEL]
    rows = []
    for name, depth in _in_order(shown):
        for key, value in shown["results"][name].items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            values = {side: _value(found, name, metric, filter_name) for side, found in results.items()}
            label = metric if filter_name == "none" else key
            difference = _difference(results, name, metric, filter_name)
            rows.append(Row(name, depth, label, values, difference, _questions(shown, name)))
    return rows


def note_on_errors(rows: list[Row]) -> str | None:
    """What to say of numbers whose standard error is 0: it tells nothing, for all questions came out alike."""
    alike = [row for row in rows if any(mean and mean[1] == 0 for mean in (*row.values.values(), row.difference))]
    if not alike:
        return None
    note = "A number without ± has no standard error: all questions came out alike."
    shares = [
        row
        for row in alike
        if row.questions and not row.of_tokens and any(mean in ((0, 0), (1, 0)) for mean in row.values.values())
    ]
    if not shares:
        return note
    fewest = min(row.questions or 0 for row in shares)
    off = f"{share_may_be_off(fewest):.2g}"
    return f"{note} With {fewest:,} questions, a share of 0 or 1 may be off by {off} (95 %, Wilson)."


def _in_order(results: dict[str, Any]) -> Iterator[tuple[str, int]]:
    members: dict[str, list[str]] = results.get("group_subtasks", {})
    inner = {member for names in members.values() for member in names}

    def walk(name: str, depth: int) -> Iterator[tuple[str, int]]:
        if name in results["results"]:
            yield name, depth
        for member in members.get(name, []):
            yield from walk(member, depth + 1)

    for name in [*members, *(name for name in results["results"] if name not in members)]:
        if name not in inner:
            yield from walk(name, 0)


def _value(results: dict[str, Any], name: str, metric: str, filter_name: str) -> Mean:
    found = results["results"][name]
    error = found.get(f"{metric}_stderr,{filter_name}")
    return float(found[f"{metric},{filter_name}"]), _number(error)


def _number(error: Any) -> float | None:
    # The harness writes "N/A", or nan for a single question.
    return float(error) if isinstance(error, int | float) and math.isfinite(error) else None


def _difference(results: dict[str, dict[str, Any]], name: str, metric: str, filter_name: str) -> Mean | None:
    if BASE not in results:
        return None
    base, adapter = (_value(results[side], name, metric, filter_name)[0] for side in (BASE, ADAPTER))
    before, after = (_by_question(results[side], name, metric, filter_name) for side in (BASE, ADAPTER))
    if not before or before.keys() != after.keys():
        return adapter - base, None
    mean, error = mean_with_error([after[question] - before[question] for question in before])
    # A metric that is no mean over questions (a corpus's BLEU, a median) has no error that comes from them.
    return adapter - base, error if math.isclose(mean, adapter - base, rel_tol=1e-6, abs_tol=1e-9) else None


def _by_question(results: dict[str, Any], name: str, metric: str, filter_name: str) -> dict[tuple[str, int], float]:
    values = {}
    for task in _leaves(results, name):
        for sample in results.get("samples", {}).get(task, []):
            if sample["filter"] == filter_name and isinstance(sample.get(metric), int | float):
                values[task, sample["doc_id"]] = float(sample[metric])
    return values


def _questions(results: dict[str, Any], name: str) -> int | None:
    counts = [results.get("n-samples", {}).get(task, {}).get("effective") for task in _leaves(results, name)]
    return None if None in counts else sum(counts)


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    members = results.get("group_subtasks", {}).get(name, [])
    return [leaf for member in members for leaf in _leaves(results, member)] if members else [name]

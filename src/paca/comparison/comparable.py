"""Whether the scores of runs mean the same, and what else is not the same for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paca.comparison.methods import JUDGING, LOSS_SCOPE
from paca.comparison.rows import Row

_JUDGED_BY = (
    "metric", "eval_examples", "model.name", "data.eval", "data.eval_split", "data.heldout_seed", "eval.limit",
    "data.format", "data.label", "eval.answer_pattern", "eval.max_new_tokens",
    *(f"{section}.{name}" for section, names in JUDGING.items() for name in names),
)  # fmt: skip


def incomparable(rows: Iterable[Row]) -> list[str]:
    """The settings in which runs differ so that their scores can't be compared, each with its values; empty for none.

    What is scored by its answers is not touched by where the training loss falls.
    """
    rows = list(rows)
    split_off = any(not isinstance(at(row["run_info"]["config"], ("data", "eval")), str) for row in rows)
    keys = [*_JUDGED_BY, *(("data.train", "data.limit") if split_off else ())]
    if all(row["metric"] in ("exact_match", "choice") for row in rows):
        keys = [key for key in keys if key.removeprefix("train.") not in LOSS_SCOPE]
    return [f"{key} ({' or '.join(map(_shown, values))})" for key, values in _differing(rows, keys).items()]


def unlike(rows: Iterable[Row]) -> list[str]:
    """What else is not the same for all runs, and a reader has to know."""
    named = {
        "data.train": "training data",
        "data.limit": "limit of the training data",
        "steps": "steps",
        "meta_info.system_info.cpu": "processor",
        "meta_info.system_info.device_name": "device",
        "meta_info.package_info": "versions of libraries",
        "meta_info.git": "state of the code",
    }
    return [named[key] for key in _differing(rows, tuple(named))]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _differing(rows: Iterable[Row], keys: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for row in rows:
        for key, values in found.items():
            path = key.split(".")
            value = at(row, path) if path[0] in row else at(row["run_info"]["config"], path)
            if value not in values:
                values.append(value)
    return {key: values for key, values in found.items() if len(values) > 1}


def at(values: Any, path: Sequence[str]) -> Any:
    """The value at a path of names; None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values

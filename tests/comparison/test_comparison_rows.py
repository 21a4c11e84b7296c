"""What a run is judged by, and what its row holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comparison.fake_trainer import summary
from comparison.small_comparison import COMMON
from paca.comparison.rows import Row, row_of
from paca.training.folder.run_folder import RunFolder


def row_with(folder: Path, *, train: dict[str, Any], evaluated: dict[str, Any] | None = None, **changed: Any) -> Row:
    """Of a finished run with such settings, whose summary has the other changes."""
    settings = {"learning_rate": 1e-3, "seed": 0, **train}
    config = {**COMMON, "train": settings, "eval": evaluated or {}}
    (folder / "summary.json").write_text(json.dumps({**summary(config, 1.5), **changed}))
    found = row_of(RunFolder(folder), "paca")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("trainer", "metric"),
    [("classification", "accuracy"), ("reward", "accuracy"), ("dpo", "rewards/accuracies"), ("grpo", "reward")],
)
def test_a_trainer_that_measures_more_than_its_loss_is_judged_by_that(
    tmp_path: Path, trainer: str, metric: str
) -> None:
    after = {metric: 0.75, f"{metric}_stderr": 0.1, "examples": 16, "samples": []}
    found = row_with(tmp_path, train={"trainer": trainer}, scores={"after": after})
    assert (found["metric"], found["score"], found["lower_is_better"]) == (metric, 0.75, False)
    assert found["score_stderr"] == 0.1
    without = row_with(tmp_path, train={"trainer": trainer}, scores=None)
    assert (without["metric"], without["score"]) == (metric, None)  # never by its loss


def test_supervised_training_is_judged_by_its_metric_or_else_by_its_loss(tmp_path: Path) -> None:
    assert row_with(tmp_path, train={})["score"] == 1.5
    scores = {"after": {"exact_match": 0.25, "exact_match_stderr": 0.1, "examples": 16, "samples": []}}
    found = row_with(tmp_path, train={}, evaluated={"metric": "exact_match"}, scores=scores)
    assert (found["metric"], found["score"], found["lower_is_better"]) == ("exact_match", 0.25, False)

"""How many held-out examples the losses and scores of a run rest on, and what is said of those left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paca.comparison.rows import row_of
from paca.evaluation.own_data import scorer
from paca.training import RunResult, load_run_config, train
from paca.training.folder.run_folder import RunFolder

LONG = {"prompt": "x" * 200, "completion": "y"}


def write(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_examples_that_are_left_out_are_not_counted(config_file: Path, tmp_path: Path, packing: bool) -> None:
    records = [json.loads(line) for line in (config_file.parent / "train.jsonl").read_text().splitlines()]
    given = [
        f"data.train={write(tmp_path / 'train.jsonl', [*records[:8], LONG])}",
        f"data.eval={write(tmp_path / 'eval.jsonl', [*records[8:14], LONG, LONG])}",
        f"output.dir={tmp_path / 'run'}",
        f"train.packing={packing}".lower(),
    ]
    settings = ["data.unusable=leave_out", "train.max_steps=1"]
    result = train(load_run_config(config_file, [*given, *settings]), console=Console(quiet=True))
    assert result.summary is not None
    data = result.summary["data"]
    said = "1 training and 2 held-out examples are too long for train.max_length, and left out."
    assert (data["train_examples"], data["eval_examples"], data["left_out"]) == (8, 6, said)
    assert said in (result.folder / "report.html").read_text()
    assert "Loss on 6 held-out examples: " in (result.folder / "adapter" / "README.md").read_text()
    row = row_of(RunFolder(result.folder), "paca")
    assert row is not None
    assert row["eval_examples"] == 6


def test_a_run_is_judged_by_as_many_examples_as_its_score_has(tmp_path: Path, config_file: Path) -> None:
    """Answers are compared of all, the loss is measured of those that fit into `train.max_length`."""
    records = [{"prompt": f"a {n}", "completion": "b"} for n in range(6)]
    given = [
        f"data.eval={write(tmp_path / 'eval.jsonl', [*records, LONG, LONG])}",
        f"output.dir={tmp_path / 'run'}",
        *("data.unusable=leave_out", "train.max_steps=1", "eval.metric=exact_match", "eval.max_new_tokens=2"),
    ]
    config = load_run_config(config_file, given)
    result = train(config, console=Console(quiet=True), scorer=scorer(config.eval))
    assert result.summary is not None
    row = row_of(RunFolder(result.folder), "paca")
    assert row is not None
    assert (result.summary["data"]["eval_examples"], row["eval_examples"]) == (6, 8)


@pytest.mark.slow(reason="trains several times")
def test_all_held_out_examples_are_measured_where_training_drops_the_last_batch(
    finished: Callable[..., RunResult],
) -> None:
    """Of 8 examples those beyond the first 5 were left out, and of none of 9 the run ended in a `KeyError`."""
    losses = []
    for size, drop in ((5, "false"), (5, "true"), (8, "false"), (9, "true")):
        sizes = [f"train.per_device_eval_batch_size={size}", f"train.dataloader_drop_last={drop}"]
        summary = finished("train.max_steps=1", *sizes).summary
        assert summary is not None
        losses.append((summary["eval_loss_before"], summary["eval_loss_after"]))
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]

"""`train.early_stopping_patience`: a run that gets no better ends, with the weights that were best."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from paca.cli.train import show_result
from paca.comparison.own_keys import notes_on_own, without_own
from paca.messages.errors import PacaError
from paca.training import describe, load_run_config
from paca.training.plan import show_plan
from training.test_run import Runner, run  # noqa: F401 - the second is a fixture
from training.tiny_run import rows, same_adapter

# The highest loss counts as the best one, which is the first: at step 2 of 10.
WORSE = ("train.max_steps=10", "train.greater_is_better=true", "train.metric_for_best_model=loss")
PATIENT = ("train.early_stopping_patience=2", *WORSE)


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in rows(folder) if row.get("eval_loss") is not None]


def test_it_ends_after_so_many_evaluations_without_a_better_one(
    run: Runner,  # noqa: F811
    finished: Runner,
    tmp_path: Path,
) -> None:
    result = finished(*PATIENT)
    assert result.summary is not None
    assert result.summary["steps"] == 6
    assert steps_of(result.folder) == [0, 2, 4, 6]
    best = next(row["eval_loss"] for row in rows(result.folder) if row["step"] == 2 and "eval_loss" in row)
    assert result.summary["eval_loss_after"] == best
    assert result.summary["kept_step"] == 2
    for name, value in result.summary["metrics"].items():
        until = [row[name] for row in rows(result.folder) if row["step"] <= 2 and row.get(name) is not None]
        assert value == until[-1], name
    shown = io.StringIO()
    show_result(result, Console(file=shown, width=200))
    assert "(the weights of step 2, the best, are kept)" in shown.getvalue()
    run("best", "train.load_best_model_at_end=true", *WORSE)
    assert same_adapter(result.folder, tmp_path / "best")


@pytest.mark.slow(reason="trains several times")
def test_it_goes_on_while_evaluations_are_better(
    run: Runner,  # noqa: F811
    finished: Runner,
    tmp_path: Path,
) -> None:
    result = run("whole", "train.early_stopping_patience=1")
    assert result.summary is not None
    assert result.summary["steps"] == 6
    assert same_adapter(tmp_path / "whole", finished().folder)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_stopped_one_ends_where_it_would_have(
    stop: int,
    run: Runner,  # noqa: F811
    finished: Runner,
    tmp_path: Path,
) -> None:
    whole = finished(*PATIENT)
    assert run("parts", *PATIENT, stop_at=stop).resume_command is not None
    parts = run("parts", *PATIENT, resume=True)
    assert whole.summary is not None
    assert parts.summary is not None
    assert parts.summary["steps"] == whole.summary["steps"] == 6
    assert same_adapter(whole.folder, tmp_path / "parts")


def test_one_that_died_as_it_had_ended_makes_no_further_step(
    run: Runner,  # noqa: F811
    finished: Runner,
    tmp_path: Path,
) -> None:
    whole = finished(*PATIENT).folder
    shutil.copytree(whole, tmp_path / "died")
    (tmp_path / "died" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "died" / "adapter")
    again = run("died", *PATIENT, resume=True)
    assert again.summary is not None
    assert again.summary["steps"] == 6
    assert same_adapter(whole, tmp_path / "died")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.eval=null",), r"train\.early_stopping_patience is 2: the best one is that of held-out data"),
        (("train.eval_strategy=no",), r"goes by evaluations, and train\.eval_strategy is no"),
        (("train.early_stopping_patience=0",), r"early_stopping_patience must be above zero, not 0"),
    ],
)
def test_what_it_needs_is_asked_for(settings: tuple[str, ...], message: str, config_file: Path) -> None:
    with pytest.raises(PacaError, match=message):
        load_run_config(config_file, [*PATIENT, *settings])


def test_the_plan_says_that_the_steps_are_the_most(config_file: Path) -> None:
    plan = dict(describe(load_run_config(config_file, PATIENT)).lines())
    assert plan["steps"] == "10 at most (early_stopping_patience 2)"
    assert "load_best_model_at_end true" in plan["defaults of paca"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("train.early_stopping_patience=3",), None),  # evaluated after 2, 4, 6, 8 and 10 steps
        (
            ("train.early_stopping_patience=4",),
            "train.early_stopping_patience is 4, which ends no run that is evaluated 5 times (train.eval_steps 0.2 of "
            "10 steps). Evaluate more often, or wait for less.",
        ),
        (("train.eval_steps=0.5",), r"evaluated 2 times (train.eval_steps 0.5 of 10 steps)"),
        (("train.eval_strategy=epoch", "train.early_stopping_patience=9"), None),
        (("train.early_stopping_patience=null",), None),
    ],
)
def test_a_patience_that_ends_no_run_is_told_of(settings: tuple[str, ...], told: str | None, config_file: Path) -> None:
    shown = io.StringIO()
    show_plan(describe(load_run_config(config_file, [*PATIENT, *settings])), Console(file=shown, width=300))
    if told is None:
        assert "which ends no run" not in shown.getvalue()
    else:
        assert told in shown.getvalue()


def test_a_comparison_makes_all_steps() -> None:
    sections = {"train": {"early_stopping_patience": 2, "max_steps": 10}, "eval": {}}
    assert without_own(sections)["train"] == {"max_steps": 10}
    assert notes_on_own(sections) == [
        "train.early_stopping_patience: 2 of the YAML has no effect: each run of a comparison makes all its steps."
    ]

"""A run's held-out data as a task: scored without and with the adapter, and shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paca.cli import counted
from paca.cli.evaluate import evaluate
from paca.cli.train import train as train_command
from paca.data import load_examples
from paca.evaluation.own_data import Measurement, measure, scorer
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from paca.training import RunResult, load_run_config, train
from paca.training.reporting.scores import score_lines
from training.tiny_run import QUICK, save_workspace

CHOICE = ("eval.metric=choice", "data.eval=4", "train.max_steps=3")


def trained(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> RunResult:
    """A run on these records."""
    config = save_workspace(folder, QUICK)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    loaded = load_run_config(config, [f"output.dir={folder / 'run'}", *overrides])
    return train(loaded, console=Console(quiet=True), scorer=scorer(loaded.eval))


QUESTIONS = [{"question": f"Is it {n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(16)]
SUMS = [{"prompt": f"{n}+1=", "completion": f"#### {n + 1}"} for n in range(16)]


def test_scores_before_and_after_are_those_of_base_and_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout = str(tmp_path / "eval.jsonl")
    overrides = ("eval.metric=loss", "eval.max_new_tokens=4", "train.max_steps=4", f"data.eval={heldout}")
    result = trained(tmp_path, SUMS, *overrides)
    assert result.summary is not None
    scores = result.summary["scores"]
    loaded = load_for_generation(result.folder)
    rows = load_examples(heldout).dataset
    expected = measure(loaded.model, loaded.tokenizer, rows, Measurement("loss", max_new_tokens=4)).as_dict()
    with loaded.model.disable_adapter():
        before = measure(loaded.model, loaded.tokenizer, rows, Measurement("loss", max_new_tokens=4)).as_dict()
    assert scores == {"before": before, "after": expected}
    assert scores["after"]["loss"] < scores["before"]["loss"]
    assert len(scores["after"]["samples"]) == 5
    assert json.loads((result.folder / "summary.json").read_text())["scores"] == scores
    capsys.readouterr()
    evaluate(str(result.folder), output=tmp_path / "again")  # the finished run, measured once more
    again = json.loads((tmp_path / "again/own_data.json").read_text())
    assert {name: again[name] for name in ("base", "adapter")} == {"base": before, "adapter": expected}
    assert again["difference"]["loss"] == pytest.approx(expected["loss"] - before["loss"])
    assert f"{expected['loss']:.4f}" in capsys.readouterr().out
    evaluate(str(result.folder), limit=2, output=tmp_path / "again")
    assert json.loads((tmp_path / "again/own_data.json").read_text())["base"]["examples"] == 2


def test_whoever_waits_for_scores_is_told_how_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counted, "_SECONDS_BETWEEN_LINES", -1)
    config = save_workspace(tmp_path, QUICK)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    settings = ("eval.metric=exact_match", "eval.max_new_tokens=2", "data.eval=3", "train.max_steps=1")
    train_command(config, set_=[f"output.dir={tmp_path / 'run'}", *settings])
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Measuring exact_match on 3 held-out examples, before and after training ...")
    told = lines[start + 1 : start + 5]
    for when, lines_of_it in {"before": told[:2], "after": told[2:]}.items():
        assert lines_of_it[0] == f"{when} training: 0 of 3 answers written"  # a batch has all of them
        assert lines_of_it[1].startswith(f"{when} training: 3 of 3 answers written, in 0:")


def test_questions_with_options_train_and_are_scored_by_choice(tmp_path: Path) -> None:
    result = trained(tmp_path, QUESTIONS, *CHOICE)
    assert result.summary is not None
    assert result.summary["data"]["format"] == "mmlu"
    assert result.summary["eval_loss_after"] != result.summary["eval_loss_before"]
    for side in ("before", "after"):
        assert {"choice", "choice_stderr", "choice_normalized"} <= result.summary["scores"][side].keys()
        assert result.summary["scores"][side]["examples"] == 4


def test_the_report_shows_scores_and_answers_as_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} <b>?</b>", "completion": f"#### {n}"} for n in range(16)]
    pattern = "eval.answer_pattern=####\\s*(.+)"  # in YAML a comment
    result = trained(tmp_path, rows, "eval.metric=exact_match", pattern, "eval.max_new_tokens=4", "data.eval=6")
    page = (result.folder / "report.html").read_text()
    assert "exact match, held-out data" in page
    assert re.search(r"<th>question</th><th>reference</th><th>before</th><th>after</th>", page)
    assert page.count("&lt;b&gt;?&lt;/b&gt;</td><td>#### ") == 5
    assert "<b>?</b>" not in page


def test_one_side_alone_is_measured_where_the_other_is_not_wanted(tmp_path: Path) -> None:
    result = trained(tmp_path, QUESTIONS, *CHOICE, "eval.before=false")
    assert result.summary is not None
    assert list(result.summary["scores"]) == ["after"]


def test_a_model_that_is_trained_whole_is_read_again_to_be_scored_as_it_came(tmp_path: Path) -> None:
    overrides = ("eval.metric=loss", "eval.max_new_tokens=4", "train.max_steps=2", "data.eval=4")
    whole, columns = (
        trained(tmp_path / name, SUMS, *overrides, *settings).summary
        for name, settings in (("full", ["full={}", "paca=null"]), ("paca", []))
    )
    assert whole is not None
    assert columns is not None
    assert whole["scores"]["before"] == columns["scores"]["before"]
    assert whole["scores"]["after"]["loss"] != whole["scores"]["before"]["loss"]


@pytest.mark.parametrize(
    ("rows", "overrides", "expected"),
    [
        (SUMS, ("eval.metric=choice",), "there are no options to choose from"),
        (SUMS, ("eval.metric=exact_match", "eval.answer_pattern=x(.)"), "finds no answer in the reference"),
        ([{"text": "a b c"}] * 16, ("eval.metric=exact_match",), "plain text has no question"),
        (SUMS, ("eval.metric=loss", "data.eval=null"), "eval.metric is measured on held-out data; give data.eval too"),
        (SUMS, ("eval.metric=loss", "eval.answer_pattern=x"), "eval.answer_pattern goes with eval.metric: exact_match"),
        (SUMS, ("eval.metric=loss", "eval.max_new_tokens=0"), "eval.max_new_tokens is 0; it must be 1 or more"),
        (SUMS, ("eval.metric=acuracy",), "must be"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    tmp_path: Path, rows: list[dict[str, Any]], overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(PacaError, match=expected):
        trained(tmp_path, rows, *overrides)
    assert not (tmp_path / "run").exists()


def test_answers_as_long_as_the_context_are_refused_before_training(tmp_path: Path) -> None:
    expected = r"^eval\.max_new_tokens is 256, and the model's context has 256: .* smaller\."
    with pytest.raises(PacaError, match=expected):
        trained(tmp_path, SUMS, "eval.metric=exact_match", "data.eval=4", "train.max_steps=1")
    assert not (tmp_path / "run").exists()


def test_the_adapter_is_there_when_scoring_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PacaError("no memory for answers")

    monkeypatch.setattr("paca.training.run.scores_by", fail)
    overrides = ("eval.metric=exact_match", "eval.max_new_tokens=2", "data.eval=4", "train.max_steps=1")
    with pytest.raises(PacaError, match="no memory for answers"):
        trained(tmp_path, SUMS, *overrides)
    loaded = load_for_generation(tmp_path / "run" / "adapter")
    assert any(bool(p.any()) for name, p in loaded.model.named_parameters() if "paca_delta" in name)
    monkeypatch.undo()
    again = load_run_config(tmp_path / "run" / "config.yaml", [])
    result = train(again, resume=True, console=Console(quiet=True), scorer=scorer(again.eval))
    assert result.summary is not None
    assert "Held-out exact match" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_metric_needs_a_scorer(tmp_path: Path) -> None:
    config = load_run_config(save_workspace(tmp_path, QUICK), ["eval.metric=loss"])
    with pytest.raises(PacaError, match=r"go together: train\(config, scorer=own_data.scorer\(config.eval\)\)"):
        train(config, console=Console(quiet=True))


def test_a_score_without_spread_claims_no_error() -> None:
    side = {"accuracy": 1.0, "accuracy_stderr": 0.0, "examples": 4, "samples": []}
    assert score_lines({"before": side | {"accuracy_stderr": None}, "after": side}) == [
        ("accuracy", "1.0000 → 1.0000 (all 4 alike)")
    ]

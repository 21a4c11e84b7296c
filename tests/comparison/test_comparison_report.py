"""The three files of a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from comparison.result_maker import result
from comparison.small_comparison import small_work
from paca.cli.compare import show_result
from paca.comparison.compare import compare_folders
from paca.comparison.report import note_on_intervals, write_report
from paca.comparison.results import ComparisonResult
from paca.messages.errors import PacaError
from paca.training.folder.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    small_work(folder, seeds=[0, 1, 2]).run()
    return folder


def report_of(folder: Path, found: ComparisonResult, runs: Path) -> tuple[str, str]:
    write_report(folder, found, {path.name: RunFolder(path) for path in runs.iterdir()})
    return (folder / "comparison.html").read_text(), (folder / "comparison.md").read_text()


def made_folders(found: ComparisonResult, runs: Path) -> Path:
    for row in (row for method in found.methods for row in method.rows):
        folder = RunFolder(runs / row["name"])
        folder.path.mkdir(parents=True)
        folder.metrics.write_text('{"step": 0, "eval_loss": 2.0}\n')
    return runs


def test_runs_that_are_there_are_reported_on(trained: Path, tmp_path: Path) -> None:
    runs = sorted((trained / "runs").glob("*lr0.003*"), reverse=True)  # paca first
    found = compare_folders(runs, tmp_path / "report")
    assert [method.name for method in found.methods] == ["paca-lr0.003", "lora-lr0.003"]
    assert [sorted(method.scores) for method in found.methods] == [[0, 1, 2], [0, 1, 2]]
    assert found.verdict.startswith("paca-lr0.003 is better than lora-lr0.003")
    page = (tmp_path / "report" / "comparison.html").read_text()
    assert page.count("<svg") == 3  # no rates: nothing was searched
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|<script""", page)  # nothing from elsewhere
    assert found.verdict.split(";")[0] in page.replace("&#x27;", "'")
    written = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert written["verdict"] == found.verdict
    text = (tmp_path / "report" / "comparison.md").read_text()
    assert f"**{found.verdict}**" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:5]}) == 1


def test_runs_that_differ_in_their_seed_alone_are_one_method(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="differ in nothing but their seeds"):
        compare_folders(sorted((trained / "runs").glob("paca-lr0.003-*")), tmp_path)


def test_a_folder_without_a_finished_run_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PacaError, match="empty holds no finished run"):
        compare_folders([trained / "runs" / "paca-lr0.003-seed0", tmp_path / "empty"], tmp_path)


@pytest.mark.parametrize(
    "scores",
    [
        {"paca": {0: 1.0}, "lora": {0: None}},
        {"paca": {0: None}, "lora": {0: None}},
        {"a|b": {0: 1.0, 1: 1.1}, "<i>": {0: 1.0, 1: 1.2}},
    ],
    ids=["one failed", "all failed", "odd names"],
)
def test_reports_stand_whatever_came_out(scores: dict[str, dict[int, float | None]], tmp_path: Path) -> None:
    found = result(scores)
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    assert "<i>" not in page
    for row in (row for method in found.methods for row in method.failed):
        assert f"| {row['name']} | 0.001 | 0 | failed: out of memory |" in text
    if "a|b" in scores:
        assert "| a\\|b | 0.001 | 2 |" in text


def test_seeds_that_are_all_alike_give_no_interval(tmp_path: Path) -> None:
    found = result({"paca": {0: 1.0, 1: 2.0}, "lora": {0: 1.5, 1: 1.5}})
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    assert "± 0.0000" not in page + text
    assert "| 1.5000 |" in text


def test_a_difference_that_rounds_to_nothing_has_no_sign(tmp_path: Path) -> None:
    found = result({"paca": {0: 1.0, 1: 1.0}, "lora": {0: 1.00001, 1: 0.99997}})  # PaCA minus LoRA: 0.00001
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    assert "| 0.0000 ± " in text
    assert "difference 0.0000, " in found.verdict
    for told in (page, text, found.verdict):
        assert not re.search(r"[-+]0\.0000", told)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_difference_is_named_for_what_it_is_to_and_intervals_are_explained_where_shown(
    seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(
        {name: {seed: size + seed for seed in range(seeds)} for name, size in (("mine", 1.0), ("lora", 2.0))}
    )
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    show_result(found, tmp_path, Console(width=200))
    for told in (page, text, capsys.readouterr().out):
        assert "mine minus it" in told
        assert ("-1.0000" in told, "+1.0000" in told) == (True, False)  # one sign in table and verdict
        assert told.count("After ± is half of a 95 % interval") == (seeds > 1)
        assert "counts the examples" not in told  # of a loss


@pytest.mark.parametrize(
    ("changed", "head"),
    [
        ({}, "loss (lower is better)"),
        ({"metric": "choice", "lower_is_better": False}, "choice (higher is better)"),
    ],
)
def test_the_tables_say_which_sign_is_good(
    changed: dict[str, object], head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result({"paca": {0: 1.0, 1: 1.1}, "lora": {0: 2.0, 1: 2.2}}, score_stderr=0.1, **changed)
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    show_result(found, tmp_path, Console(width=200))
    terminal = capsys.readouterr().out
    assert f"<th>{head}</th><th>paca minus it</th>" in page
    assert f"| {head} | paca minus it |" in text
    assert head in terminal
    for told in (page, text, terminal):  # which is told by the name of the metric
        assert ("counts the examples" in told) == ("choice" in head)


def test_a_loss_that_is_the_score_has_one_column_of_every_run(tmp_path: Path) -> None:
    found = result({"paca": {0: 1.0, 1: 1.1}, "lora": {0: 2.0, 1: None}})
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    assert "| run | rate | seed | held-out loss | steps |" in text
    assert "| paca-lr0.001-seed1 | 0.001 | 1 | 1.1000 | 10 |" in text
    assert "| lora-lr0.001-seed1 | 0.001 | 1 | failed: out of memory |  |" in text
    assert page.count("held-out loss</th>") == 1
    found.methods[0].rows[0]["loss"] = 1.25  # eval.metric: loss is one over tokens, the trainer's over batches
    page, text = report_of(tmp_path / "again", found, made_folders(found, tmp_path / "others"))
    assert "| paca-lr0.001-seed0 | 0.001 | 0 | 1.0000 | 1.2500 | 10 |" in text
    assert "| run | rate | seed | loss | held-out loss | steps |" in text


@pytest.mark.parametrize("seeds", [1, 2])
def test_bars_are_said_to_be_other_intervals_than_the_verdicts(seeds: int, tmp_path: Path) -> None:
    scores = {name: {seed: size + seed for seed in range(seeds)} for name, size in (("paca", 1.0), ("lora", 2.0))}
    found = result(scores)
    page, _ = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    assert ("bars may overlap where it says better" in page) == (seeds > 1)


@pytest.mark.parametrize(("steps", "told"), [(99, True), (100, False)])
def test_runs_of_few_steps_are_said_to_tell_little_wherever_the_verdict_is(
    steps: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result({"paca": {0: 1.0, 1: 1.1}, "lora": {0: 2.0, 1: 2.2}}, steps=20)
    for row in found.methods[1].rows:
        row["steps"] = steps
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    show_result(found, tmp_path, Console(width=200))
    written = (tmp_path / "report" / "comparison.json").read_text()
    for shown in (page, text, written, capsys.readouterr().out):
        assert ("The runs have 99 steps at most: so few tell little of a longer training." in shown) == told


@pytest.mark.parametrize(
    ("counts", "judged", "few"),
    [
        ((3, 3), "Judged by loss on 3 held-out examples.", "There are 3 held-out examples: so few tell little of"),
        ((1, 1), "Judged by loss on 1 held-out example.", "There is 1 held-out example: so few tell little of"),
        ((29, 1200), "Judged by loss on 29 or 1,200 held-out examples.", "There are 29 held-out examples: so few"),
        ((30, 30), "Judged by loss on 30 held-out examples.", None),
        ((None, None), None, None),  # of old rows
    ],
)
def test_how_many_examples_were_judged_is_said_wherever_the_verdict_is(
    counts: tuple[int | None, int | None],
    judged: str | None,
    few: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = result({"paca": {0: 1.0, 1: 1.1, 2: None}, "lora": {0: 2.0, 1: 2.2}})
    for method, count in zip(found.methods, counts, strict=True):
        for row in method.rows:
            row["eval_examples"] = count
    page, text = report_of(tmp_path / "report", found, made_folders(found, tmp_path))
    show_result(found, tmp_path, Console(width=200))
    written = (tmp_path / "report" / "comparison.json").read_text()
    for shown in (page, text, written, capsys.readouterr().out):
        assert re.findall(r"Judged by [^.]*\.", shown) == ([] if judged is None else [judged])
        assert shown.count("so few tell little of others, and the verdict speaks of these alone.") == (few is not None)
        assert few is None or few in shown


def test_the_difference_of_shares_is_said_to_count_examples() -> None:
    heads, cells = (
        ["method", "rate", "seeds", "choice", "paca minus it"],
        ["paca", "1e-3", "2", "0.5000 ± 0.1000", ""],
    )
    (told,) = note_on_intervals((heads, [cells]))
    assert "also counts the examples as drawn by chance" in told
    assert "Two seeds are too few" in told
    cells[2] = "3"
    assert "Two seeds" not in note_on_intervals((heads, [cells]))[0]

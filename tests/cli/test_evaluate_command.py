"""`paca evaluate`, each time as a process."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.paca_process import forked_paca, fresh_paca, start_paca
from evaluation.judge_server import judging, verdict
from evaluation.question_tasks import save_task
from paca.cli import app
from paca.cli.evaluate_tables import print_ratings, table_of
from paca.evaluation.side_by_side import Row
from paca.messages.errors import PacaError
from tiny_checkpoint import save_run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    save_run(folder / "run")
    save_task(folder, "sums", 12)
    return folder


@pytest.fixture(autouse=True)
def datasets_cache(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workspace / "datasets-cache"))


def test_base_and_adapter_are_printed_side_by_side(workspace: Path) -> None:
    done = fresh_paca("evaluate", "run", "--tasks", "sums.yaml", "--limit", 9, "--output", "out", cwd=workspace)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    counts = [f"{side}: {done} of 27 options compared" for side in ("base", "adapter") for done in (0, 27)]
    assert [re.sub(r", in \d+:\d\d$", "", line) for line in lines[:5]] == ["Loading run ...", *counts]
    assert all(re.search(r", in \d+:\d\d$", line) for line in (lines[2], lines[4]))
    assert re.search(r"task .* metric .* base .* adapter .* difference", done.stdout)
    results = json.loads((workspace / "out" / "results.json").read_text())["results"]["sums"]
    [accuracy] = [line for line in lines if re.search(r"\bacc\b", line)]
    assert f"{results['acc,none']:.4f} ± {results['acc_stderr,none']:.4f}" in accuracy
    assert lines[-1] == "Written: out/results.json"


def test_columns_may_be_named_one_by_one(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one alone held, without a word."""
    given: list[Any] = []
    monkeypatch.setattr(sys.modules["paca.cli.evaluate"], "_measure_own_data", lambda *all_: given.extend(all_[:3]))
    columns = ["--columns", "question=Frage", "--columns", "answer=Antwort"]
    result = CliRunner().invoke(app, ["evaluate", str(workspace / "run"), "--data", "fragen.csv", *columns])
    assert result.exception is None
    assert given[1:] == ["fragen.csv", {"question": "Frage", "answer": "Antwort"}]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("question=Frage", "there is no column Frage, which --columns names; found: question, answer. Leave question "),
        ("question=Frage", " Leave question out of --columns: the data has a column of that name."),
        (
            "tools=question",
            " (or --set data.columns.NAME=YOURS), or rename them. (For `paca evaluate --data`: --columns ",
        ),
        ("Frage=question", "--data: --columns names Frage, which is a column of no form of data."),
    ],
)
def test_what_is_wrong_with_the_flag_is_told_by_its_name(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, columns: str, told: str
) -> None:
    """It named `data.columns`, which is no option."""
    monkeypatch.chdir(workspace)
    Path("there.csv").write_text("question,answer\nHow many?,2\n")
    result = CliRunner().invoke(app, ["evaluate", "run", "--data", "there.csv", "--columns", columns])
    assert isinstance(result.exception, PacaError)
    assert told in str(result.exception)


def test_the_harness_is_missed_before_anything_is_loaded(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["evaluate", str(workspace / "run"), "--tasks", "arc_easy", "--output", str(workspace / "none")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, PacaError)
    assert str(result.exception).startswith("--tasks needs lm-evaluation-harness. ")
    assert result.output == ""


def answers_in(database: Path) -> int:
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM unnamed").fetchone()[0])
    except sqlite3.OperationalError:  # just being made
        return 0


@pytest.mark.slow(reason="starts the program anew")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_keeps_the_answers_and_says_how_to_go_on(
    workspace: Path, tmp_path: Path, number: signal.Signals
) -> None:
    save_task(workspace, "many", 1000)  # much work: the signal comes long before its end
    command = ("evaluate", "run", "--tasks", "many.yaml", "--output", tmp_path / "out", "--batch-size", 4)
    process = start_paca(*command, streams=tmp_path, cwd=workspace)
    while not any(answers_in(file) for file in (tmp_path / "out" / "answers").glob("base-*.db")):
        assert process.exitcode is None, (tmp_path / "stderr").read_text()
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    output = (tmp_path / "stdout").read_text()
    assert process.exitcode == 130
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert "Stopped. What was answered is kept; the same command goes on from there:" in output
    assert "--tasks many.yaml" in output.splitlines()[-1]
    [database] = (tmp_path / "out" / "answers").glob("base-*.db")
    assert 0 < answers_in(database) < 3 * 1000


@pytest.mark.slow(reason="starts the program anew")
def test_mt_bench_prints_ratings_and_what_the_judge_took(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACA_JUDGE_KEY", "secret")
    rows = [{"question_id": n, "category": "maths", "turns": [f"{n}?", "Sure?"]} for n in range(4)]
    (workspace / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with judging(lambda body, number: verdict("[[4]]", {"prompt_tokens": 1000, "completion_tokens": 5})) as server:
        judge = ("--judge-url", server.url, "--judge-model", "strict")
        asked_for = ("evaluate", "run", "--mt-bench", "question.jsonl", *judge, "--limit")
        done = forked_paca(*asked_for, 2, "--max-new-tokens", 4, "--output", "judged", cwd=workspace)
        first = len(server.requests)
        longest = forked_paca(*asked_for, 1, "--max-new-tokens", 250, "--output", "long", cwd=workspace)
        default = forked_paca(*asked_for, 1, "--output", "default", cwd=workspace)
    assert (done.returncode, done.stderr) == (0, "")
    assert {headers["Authorization"] for headers, _ in server.requests} == {"Bearer secret"}
    assert "4 questions lost the beginning: with answers of 250 tokens there is no room in the" in longest.stdout
    assert "Answers were cut at 64 tokens, so that two of them fit the model's context" in default.stdout
    assert "base: 0 of 4 answers judged by strict" in done.stdout
    asked = {body["messages"][1]["content"].split("\n")[1] for _, body in server.requests[:first]}
    assert asked == {"0?", "2?"}  # spread over the file
    assert re.search(r"maths[ │]+4.00[ │]+4.00[ │]+\+0.00[ │]+\n", done.stdout)
    assert "The judge read 8,000 tokens and wrote 40, in 8 requests, for the verdicts kept." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "it is no folder of a run, which has data of its own"),
        (("--mt-bench", "q.jsonl"), "--mt-bench, --judge-url and --judge-model go together"),
        (("--tasks", "", "--output", "out"), "--tasks names no task"),
        (("--num-fewshot", 5), "--num-fewshot goes with --tasks"),
        (("--data", "new.jsonl", "--tasks", "arc_easy", "--output", "out"), "--tasks and --mt-bench bring data"),
        (("--max-new-tokens", 5), "--max-new-tokens goes with --mt-bench"),
        (("--set", "eval.metric=word_f1", "--data", "x.jsonl"), "--set: eval.metric must be"),
        (("--set", "train.seed=1"), "only eval.metric, eval.answer_pattern, eval.max_new_tokens can be changed"),
        (("--set", "eval.limit=3"), "of paca evaluate that is --limit"),
        (("--set", "eval.metric=loss", "--tasks", "arc_easy"), "--tasks and --mt-bench say it themselves"),
        # Before the model is loaded, which would fail here.
        (("--tasks", "nowhere.yaml", "--base-model", "./nowhere"), "There is no task file 'nowhere.yaml'"),
        (
            ("--mt-bench", "q.jsonl", "--judge-url", "http://x", "--judge-model", "j", "--base-model", "./nowhere"),
            "There is no file of questions q.jsonl",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(workspace: Path, arguments: tuple[str, ...], expected: str) -> None:
    done = forked_paca("evaluate", "run", *arguments, "--output", "mistaken", cwd=workspace)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_table_with_large_numbers_is_whole_in_80_columns() -> None:
    values = {"base": (1234567.1234, 12345.6789), "adapter": (98765432.1, 10234.5)}
    rows = [
        Row("a_task_of_mine", 0, "word_perplexity", values, (-246912.8, 9999.1)),
        Row("mmlu_high_school_european_history", 2, "acc", {"base": (0.2345, 0.0123), "adapter": (12.5, None)}, None),
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(table_of(rows, 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for number in ("1234567 ± 12346", "9.877e+07 ± 1.023e+04", "-246913 ± 9999", "0.2345 ± 0.0123", "12.500"):
        assert number in text
    lines = text.splitlines()
    task = next(line for line in lines if "metric" in line).index("metric")
    names = "".join(line[:task].strip() for line in lines)
    assert "a_task_of_mine" in names
    assert "mmlu_high_school_european_history" in names


def test_a_metrics_name_is_not_broken_in_80_columns() -> None:
    values = {"base": (0.1234, 0.0345), "adapter": (0.2345, 0.0345)}
    task, metrics = "held-out data, 1,234 examples", ("token_accuracy", "choice_normalized", "exact_match,strict-match")
    console = Console(file=io.StringIO(), width=80)
    console.print(table_of([Row(task, 0, metric, values, (0.1, 0.02)) for metric in metrics], 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("token_accuracy ", "choice_normalized ", "exact_match, ", "strict-match ", "+0.1000 ± 0.0200"):
        assert part in text


def test_categories_of_a_strangers_questions_can_not_rename_the_window() -> None:
    found = {"score": 5.0, "stderr": None}
    model = {"all": found, "turns": {}, "categories": {"\x1b]0;mine\x07" + "x" * 5_000: found}, "without_grade": 0}
    shown = io.StringIO()
    judge = {"prompt_tokens": 1, "completion_tokens": 1, "requests": 1}
    lengths = {"max_new_tokens": 1024, "context": None, "cut_questions": 0}
    print_ratings(Console(file=shown, width=300), {"models": {"base": model}, "judge": judge, **lengths})
    assert "\\x1b]0;mine\\x07xxx" in shown.getvalue()
    assert "\x1b" not in shown.getvalue()
    assert len(shown.getvalue()) < 3_000

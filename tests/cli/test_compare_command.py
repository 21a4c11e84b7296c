"""`paca compare`, each time as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from cli.paca_process import forked_paca, start_paca
from paca.cli.compare import compare
from paca.messages.program import program
from training.tiny_run import save_workspace

COMPARE = (
    "compare",
    "config.yaml",
    "--methods",
    "paca,lora-tuned",
    "--seeds",
    "0,1",
    "--no-extend",
    "--lr",
    "1e-2,3e-2",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("compare")
    save_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets-cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--lr", ""], "--lr is empty. Give numbers with commas between"),
        (["config.yaml", "--lr", "lor=1e-3"], "--lr lor=...: no method of that name is compared. Did you mean 'lora'?"),
        (["config.yaml", "--lr", "1e-3,x"], "--lr: 'x' is no rate; a number above zero was expected"),
        (["config.yaml", "--lr", "1e-3", "--seeds", "a"], "--seeds: 'a' is no seed"),
        (["config.yaml", "--lr", "1e-3", "--methods", "lorra"], "There is no method 'lorra'. Did you mean 'lora'?"),
        (["config.yaml", "--lr", "1e-3", "--set", "data.eval=null"], "data.eval is missing"),
        (["missing.yaml", "--lr", "1e-3"], "There is no file missing.yaml"),
        (["nosuch"], "There is no file nosuch and no folder of that name"),
        (["model", "model", "--dry-run", "--lr", "1"], "--lr, --dry-run would change nothing"),
        (["config.yaml", "config.yaml", "--lr", "1"], "config.yaml is a file beside others; expected one YAML alone"),
        (["model", "config.yaml"], "config.yaml is a file beside others; expected one YAML alone"),
        (["config.yaml", "--lr", "1e-3", "--set", "paca.rr=1"], "there is no key paca.rr"),
        (["model"], "model holds no finished run"),
        (
            ["config.yaml", "--lr", "1e-3", "--set", "train.seed=7"],
            "--set train.seed would change nothing: --seeds gives each run its own. Leave it out, and give --seeds 7.",
        ),
        (["config.yaml", "--lr", "1e-3", "--set", "paca.random_seed=7"], "--set paca.random_seed would change nothing"),
        (["config.yaml", "--lr", "1e-3", "--set", "eval={after: false}"], "--set eval.after would change nothing"),
        (["config.yaml", "--lr", "1e-3", "--set", "output.dir=x"], "each run has its own folder in --output"),
        # What each run would have refused for itself, after the model was loaded.
        (
            ["config.yaml", "--lr", "1e-3", "--set", "train.max_length=5"],
            "its runs would refuse this: 32 of 32 examples",
        ),
        (
            ["config.yaml", "--lr", "1e-3", "--set", "eval={metric: exact_match, answer_pattern: 'zz(.)zz'}"],
            "the pattern 'zz(.)zz' finds no answer in the reference",
        ),
    ],
)
def test_a_mistake_is_one_message_on_standard_error(workspace: Path, arguments: list[str], message: str) -> None:
    done = forked_paca("compare", *arguments, "--output", "wrong", cwd=workspace)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (workspace / "wrong" / "runs").exists()


def test_one_rate_is_not_said_to_go_beyond(workspace: Path) -> None:
    one = ("compare", "config.yaml", "--methods", "paca", "--lr", "1e-2", "--output", "one", "--dry-run")
    done = forked_paca(*one, cwd=workspace)
    told = ["rates 0.01; seeds 0, 1, 2", "3 runs, 30 steps in all"]
    *_, rates, work, _, disk = done.stdout.splitlines()
    assert [rates, work] == told, done.stderr
    assert re.fullmatch(r"disk space: about [\d.]+ KiB, and up to [\d.]+ KiB of checkpoints while a run goes", disk)


ONE_METHOD = "There is one method, paca, and nothing to compare it with: what comes out is its best rate and its score."
ONE_SEED = "One seed shows no difference, as chance is seen between seeds: name three, such as --seeds 0,1,2."
FEW_EXAMPLES = "There are 8 held-out examples: so few tell little of others, and the verdict speaks of these alone."
FEW_STEPS = "The runs have 10 steps at most: so few tell little of a longer training."


@pytest.mark.parametrize(
    ("methods", "seeds", "told"),
    [
        ("paca", "0,1", {ONE_METHOD}),
        ("paca,lora", "3", {ONE_SEED, FEW_STEPS, FEW_EXAMPLES}),
        ("paca,lora", "0,1", {FEW_STEPS, FEW_EXAMPLES}),
    ],
)
def test_why_there_can_be_no_verdict_is_said_before_anything_is_trained(
    workspace: Path, methods: str, seeds: str, told: set[str]
) -> None:
    command = ("compare", "config.yaml", "--methods", methods, "--seeds", seeds, "--lr", "1e-2", "--output", "alone")
    done = forked_paca(*command, "--dry-run", cwd=workspace)
    known = (ONE_METHOD, ONE_SEED, FEW_STEPS, FEW_EXAMPLES)
    assert {line for line in known if line in done.stdout} == told, done.stderr
    assert done.returncode == 0


def test_settings_of_a_yaml_that_have_no_effect_are_told_in_the_plan(workspace: Path) -> None:
    """A YAML made for paca train may have them; they were overridden without a word."""
    text = (workspace / "config.yaml").read_text()
    changed = text.replace("train:\n", "train:\n  seed: 7\n").replace("paca:\n", "paca:\n  random_seed: 8\n")
    (workspace / "seeded.yaml").write_text(f"{changed}eval:\n  after: false\n")
    command = ("--methods", "paca,lora", "--lr", "1e-2", "--output", "seeded", "--dry-run")
    done = forked_paca("compare", "seeded.yaml", *command, cwd=workspace)
    assert done.stdout.splitlines()[-3:] == [
        "train.seed: 7 of the YAML has no effect: --seeds gives each run its own.",
        "paca.random_seed: 8 of the YAML has no effect: PaCA's columns follow the run's --seeds.",
        "eval.after: false of the YAML has no effect: methods are compared by what is measured after training.",
    ], done.stdout + done.stderr
    assert "random_seed 8" not in done.stdout  # as a setting of the method
    plain = forked_paca("compare", "config.yaml", *command, cwd=workspace)
    assert plain.stdout.splitlines()[-1].startswith("disk space: "), plain.stderr


def test_held_out_data_that_is_trained_on_is_warned_of(workspace: Path) -> None:
    one = ("compare", "config.yaml", "--methods", "paca", "--lr", "1e-2", "--output", "same", "--dry-run")
    done = forked_paca(*one, "--set", "data.eval=train.jsonl", cwd=workspace)
    assert done.stdout.splitlines()[-1].startswith("Warning: 40 of the 40 held-out examples are trained on as well: ")


def test_without_rates_each_method_begins_around_its_own(workspace: Path) -> None:
    command = ("compare", "config.yaml", "--methods", "paca,lora,full", "--set", "train.learning_rate=0.5")
    rates = ("--lr", "full=1e-3", "--output", "auto", "--dry-run")
    done = forked_paca(*command, *rates, cwd=workspace)
    assert done.stdout.splitlines()[-4:-2] == [
        "rates of paca 0.312, 0.5, 0.8; of lora 0.00106, 0.0017, 0.00272; of full 0.001 and beyond while the edge is "
        "best; seeds 0, 1, 2",
        # 3 + 3 + 1 rates, and two more seeds each
        "at least 13 runs, 130 steps in all, more where a best rate is at an end of its grid (--no-extend: none)",
    ], done.stdout + done.stderr


def test_an_output_that_is_a_file_is_refused(workspace: Path) -> None:
    done = forked_paca("compare", "config.yaml", "--lr", "1e-3", "--output", "config.yaml", cwd=workspace)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--output config.yaml is a file; a folder was expected" in done.stderr


def test_a_dry_run_shows_what_came_out_equal_and_trains_nothing(workspace: Path) -> None:
    done = forked_paca(*COMPARE, "--equal", "parameters", "--output", "dry", "--dry-run", cwd=workspace)
    assert (done.returncode, done.stderr) == (0, "")
    head, paca, lora, few, few_examples, data, rates, work, times, disk = done.stdout.splitlines()
    assert head.split()[:3] == ["method", "settings", "trained"]
    assert "r 4, paca_alpha 16" in paca
    assert "1,920" in paca
    assert "r 2, lora_alpha 4, target_modules all-linear, autocast_adapter_dtype false" in lora
    assert "1,952 (1.02 ×)" in lora
    assert [few, few_examples] == [FEW_STEPS, FEW_EXAMPLES]
    assert data.startswith("data: ")  # and whether held-out examples are trained on
    assert data.endswith("; held out: 8")
    assert rates == "rates 0.01, 0.03; seeds 0, 1"
    assert work == "6 runs, 60 steps in all"
    assert "plan config.yaml` tells the least that a run takes; the time left is told" in times
    assert disk.startswith("disk space: about ")
    assert not (workspace / "dry").exists()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_stops_it_is_told_how_to_see_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*parts: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(compare.__globals__, "_train", interrupted)
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    for number in range(3):
        with pytest.raises(typer.Exit):
            compare(None, [Path("config.yaml")], Path("out"))  # type: ignore[arg-type]  # it looks at no options
        told = f"The finished runs side by side: {program()} compare out --output out-so-far"
        assert (told in capsys.readouterr().out.splitlines()) is (number > 1)
        (Path("out") / "runs" / str(number)).mkdir(parents=True)
        (Path("out") / "runs" / str(number) / "summary.json").touch()


@pytest.mark.slow(reason="starts the program anew")
def test_what_two_processes_left_one_killed_and_one_stopped_the_same_command_finishes(
    workspace: Path, tmp_path: Path
) -> None:
    """Trains two tiny runs twice, each in a process that imports everything anew. That the rows are those of a
    comparison which nothing stopped, `tests/comparison/test_work.py` shows."""
    compare = tuple({"0,1": "0", "1e-2,3e-2": "1e-2"}.get(word, word) for word in COMPARE)
    shared, processes = workspace / "shared", []
    for number in range(2):
        streams = tmp_path / str(number)
        streams.mkdir()
        processes.append(start_paca(*compare, "--output", "shared", cwd=workspace, streams=streams))
    # Both train: one is killed in the middle of its run, the other asked to stop.
    wait_until(lambda: len(list((shared / "runs").glob("*/metrics.jsonl"))) >= 2)
    killed, stopped = processes
    assert killed.pid is not None
    assert stopped.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(stopped.pid, signal.SIGINT)
    killed.join(300)
    stopped.join(300)
    assert stopped.exitcode == 130, (tmp_path / "1" / "stderr").read_text()
    told = (tmp_path / "1" / "stdout").read_text()
    assert "the same command goes on from there:" in told
    assert not list((shared / "runs").glob("*/failed.json"))

    done = forked_paca(*compare, "--output", "shared", cwd=workspace)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (shared / "runs.jsonl").read_text().splitlines()]
    assert [row["train_info"]["status"] for row in rows] == ["success", "success"]
    assert json.loads((shared / "comparison.json").read_text())["verdict"]
    assert "loss" in (shared / "comparison.md").read_text()

    done = forked_paca(*compare, "--set", "train.max_steps=11", "--output", "shared", cwd=workspace)
    assert done.returncode == 1
    assert "run.train.max_steps: 10 → 11" in done.stderr

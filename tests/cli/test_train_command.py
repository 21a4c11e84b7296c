"""`paca train`, each time as a process."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cli.paca_process import forked_paca, fresh_paca, start_paca
from paca.cli import main
from paca.cli.train import show_result
from paca.messages.errors import PacaError
from paca.training import RunResult, load_run_config, train
from training.tiny_run import curve, rows, same_adapter, save_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cli")
    save_workspace(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets-cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.mark.slow(reason="starts the program anew")
def test_a_dry_run_shows_the_resolved_run_and_leaves_nothing(workspace: Path) -> None:
    done = fresh_paca("train", "config.yaml", "--dry-run", "--settings", "--set", "output.dir=dry", cwd=workspace)
    assert (done.returncode, done.stderr) == (0, "")
    output, preview = done.stdout.split("\n\nAn example of middle length (train.jsonl, line ")
    assert output.count("\n") < 17  # what is asked for comes first, and fits a screen
    preview, settings = preview.split("\nmodel:")
    assert re.search(r"\); what the loss falls on is in ⟦ ⟧:\n\n[a-z ]+\n⟦[a-z ]+<\|im_end\|>⟧\n", preview)
    assert re.search(r"Tokens of all 32 training examples: at least \d+, median \d+, ", preview)
    resolved = yaml.safe_load(f"model:{settings}")
    assert resolved["paca"]["r"] == 4
    assert resolved["train"]["lr_scheduler_type"] == "linear"
    assert re.search(r"^method +paca, on q_proj, .*:\s14 layers$", output, re.MULTILINE)
    assert re.search(r"^trainable parameters +\d[\d,]+ \(", output, re.MULTILINE)
    assert re.search(r"^tokens per step +about \d+ \(4 sequences\)$", output, re.MULTILINE)
    assert re.search(r"^steps +10$", output, re.MULTILINE)
    assert re.search(
        r"^disk space +about \d.* \(result .*, at most 3 checkpoints at a time, each ", output, re.MULTILINE
    )
    assert not (workspace / "dry").exists()


def test_a_dry_run_tries_the_run_folder_first(workspace: Path) -> None:
    settings = ("--set", "output.dir=config.yaml/run", "--set", "model.name=nobody/nothing")
    done = forked_paca("train", "config.yaml", "--dry-run", *settings, cwd=workspace)
    assert done.returncode == 1
    assert "config.yaml/run (output.dir) can't be made or written: not a directory" in done.stderr


def test_a_dry_run_refuses_what_a_run_refuses(workspace: Path) -> None:
    settings = ("--dry-run", "--set", "train.max_length=5")
    done = forked_paca("train", "config.yaml", *settings, cwd=workspace)
    assert done.returncode == 1
    assert re.search(r"Tokens of all 32 training examples: ", done.stdout)
    assert re.search(
        r"Error: A run refuses this: \d+ of 32 examples have no token that counts in the loss", done.stderr
    )
    left_out = forked_paca("train", "config.yaml", *settings, "--set", "data.unusable=leave_out", cwd=workspace)
    assert left_out.returncode == (1 if "32 of 32" in done.stderr else 0)


def test_a_dry_run_finds_settings_that_do_not_work_out(workspace: Path) -> None:
    schedule = ("--set", "train.lr_scheduler_type=cosine_with_min_lr", "--set", "output.dir=dry")
    done = forked_paca("train", "config.yaml", "--dry-run", *schedule, cwd=workspace)
    assert done.returncode == 1
    assert "Error: The schedule of the rate (train.lr_scheduler_type: cosine_with_min_lr) can't be made" in done.stderr
    assert not (workspace / "dry").exists()


def test_a_dry_run_finds_held_out_data_that_cannot_be_scored(workspace: Path) -> None:
    done = forked_paca("train", "config.yaml", "--dry-run", "--set", "eval.metric=choice", cwd=workspace)
    assert done.returncode == 1
    assert "there are no options to choose from" in done.stderr


@pytest.mark.slow(reason="starts the program anew")
def test_a_run_in_full_is_planned_trained_asked_and_written_elsewhere(workspace: Path) -> None:
    file = workspace / "full.yaml"
    sections = yaml.safe_load((workspace / "config.yaml").read_text())
    del sections["paca"]
    file.write_text(yaml.safe_dump({**sections, "full": {}, "output": {"dir": str(workspace / "full")}}))
    planned = forked_paca("plan", file, "--json", cwd=workspace)
    assert planned.returncode == 0, planned.stderr
    content = json.loads(planned.stdout)
    assert content["trainable"] == content["parameters"]
    trained = forked_paca("train", file, cwd=workspace)
    assert trained.returncode == 0, trained.stderr
    assert "Writing model shards" not in trained.stderr
    assert re.search(rf"^model +{workspace / 'full' / 'model'}$", trained.stdout, re.MULTILINE)
    asked = forked_paca("chat", workspace / "full", "--prompt", "a cat", "--max-new-tokens", 4, cwd=workspace)
    assert asked.returncode == 0, asked.stderr
    written = forked_paca("merge", workspace / "full", "--output", workspace / "full-bf16", "--dtype", "bfloat16")
    assert written.returncode == 0, written.stderr
    assert f"{workspace / 'full'} is a whole model." in written.stdout
    assert (workspace / "full-bf16" / "model.safetensors").is_file()
    again = forked_paca("train", file, "--dry-run", cwd=workspace)
    assert (again.returncode, again.stderr) == (0, "")
    taken = f"Before it is trained: {workspace / 'full'} already holds a finished run. Give another output.dir"
    assert taken in again.stdout.splitlines()[-1]
    refused = forked_paca("export", workspace / "full", "--to", "lora", "--output", workspace / "x")
    assert "is a run that trained the whole model, so it has no adapter; see" in refused.stderr
    exported = forked_paca("export", workspace / "full", "--to", "merged", "--output", workspace / "x")
    assert (exported.returncode, (workspace / "x" / "model.safetensors").is_file()) == (0, True), exported.stderr
    base = load_run_config(file).model.name
    for switches in (("--base",), ("--beside", "base")):
        alone = forked_paca("chat", workspace / "full", "--prompt", "a cat", *switches, cwd=workspace)
        assert "is a whole model that its run trained: it has no adapter that could be left out. Give" in alone.stderr
        assert alone.stderr.endswith(f"{base}, or beside it: --beside {base}\n")
    measured = forked_paca("evaluate", workspace / "full", cwd=workspace)
    assert re.search(
        rf"^The run trained the whole model, .* evaluate {base} --data FILE$", measured.stdout, re.MULTILINE
    )


@pytest.mark.slow(reason="starts the program anew")
def test_a_real_interrupt_saves_and_the_resumed_run_ends_as_the_uninterrupted_one(
    workspace: Path, tmp_path: Path
) -> None:
    steps = ["--set", "train.max_steps=100", "--set"]
    done = forked_paca("train", "config.yaml", *steps, "output.dir=whole", cwd=workspace)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert re.search(r"^step 0: held-out loss \d\.\d+$", output, re.MULTILINE)
    assert re.search(r"^step 100/100  loss \d\.\d+  [\d,]+ tokens/s  peak .*iB  0:00 left$", output, re.MULTILINE)
    assert re.search(r"^held-out loss +\d\.\d+ → \d\.\d+$", output, re.MULTILINE)
    assert (workspace / "whole" / "report.html").read_text().count("<svg") == 6
    assert "it/s]" not in output + done.stderr  # no progress bars in a log file

    process = start_paca("train", "config.yaml", *steps, "output.dir=parts", cwd=workspace, streams=tmp_path)
    metrics = workspace / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.exitcode is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(300)
    output, errors = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == 130, errors
    assert "Traceback" not in errors
    stopped_at = rows(workspace / "parts")[-1]["step"]
    assert stopped_at < 100
    assert (workspace / "parts" / "checkpoints" / f"checkpoint-{stopped_at}").is_dir()
    command = re.search(r"Continue with:\n  \S*paca (train .* --resume)\n", output)
    assert command is not None
    assert str(workspace / "parts" / "config.yaml") in command[1]

    done = forked_paca(*command[1].split(), cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {stopped_at} of 100." in done.stdout
    assert same_adapter(workspace / "whole", workspace / "parts")
    assert curve(workspace / "whole") == curve(workspace / "parts")
    summary = json.loads((workspace / "parts" / "summary.json").read_text())
    assert summary["command"].endswith("config.yaml --resume")


def in_two_processes(streams: Path, cwd: Path, *arguments: object) -> str:
    """What both show, started with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    processes = []
    with pytest.MonkeyPatch.context() as environment:
        for rank in range(2):
            for name, value in {**given, "RANK": rank, "LOCAL_RANK": rank}.items():
                environment.setenv(name, str(value))
            (streams / str(rank)).mkdir()
            processes.append(start_paca(*arguments, streams=streams / str(rank), cwd=cwd))
    for rank, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (streams / str(rank) / "stderr").read_text()
    return "".join((streams / str(rank) / "stdout").read_text() for rank in range(2))


@pytest.mark.slow(reason="trains in several processes")
def test_two_processes_train_as_one_on_the_whole_batch_and_only_the_first_speaks(
    workspace: Path, tmp_path: Path
) -> None:
    # Plain SGD without dropout: nothing amplifies the rounding by which the two sums differ.
    model_config = workspace / "model" / "config.json"
    before = model_config.read_text()
    model_config.write_text(json.dumps(json.loads(before) | {"attention_dropout": 0.0}))
    common = ["--set", "train.optim=sgd", "--set", "train.learning_rate=1.0", "--set", "train.max_steps=10"]
    try:
        two = ("train", "config.yaml", "--probe", *common, "--set", "output.dir=two")
        shown = in_two_processes(tmp_path, workspace, *two)
        assert shown.count("step 10/10") == 1
        assert shown.count("The longest batch (2 x ") == 1
        settings = [*common[1::2], "train.per_device_train_batch_size=4", f"output.dir={workspace / 'one'}"]
        train(load_run_config(workspace / "config.yaml", settings), console=Console(quiet=True))
    finally:
        model_config.write_text(before)
    one, two = ([row["loss"] for row in rows(workspace / name) if "loss" in row] for name in ("one", "two"))
    assert len(two) == 10
    assert two == pytest.approx(one, rel=1e-4)
    assert one[-1] < one[0] - 0.05
    assert json.loads((workspace / "two" / "summary.json").read_text())["processes"] == 2
    assert rows(workspace / "two")[-2]["tokens"] == rows(workspace / "one")[-2]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "There is no file missing.yaml."),
        (["config.yaml", "--set", "train.learning_rat=1"], "Did you mean train.learning_rate?"),
        (["config.yaml", "--set", "train.max_steps=ten"], "train.max_steps must be a whole number, not the text"),
        (["config.yaml", "--set", "data.train=empty.jsonl"], "empty.jsonl holds no examples: it is empty."),
    ],
    ids=["missing file", "wrong key", "wrong type", "empty data"],
)  # fmt: skip
def test_a_mistake_is_one_message_on_standard_error(workspace: Path, arguments: list[str], message: str) -> None:
    (workspace / "empty.jsonl").touch()
    done = forked_paca("train", *arguments, cwd=workspace)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paca", *arguments])
    main()


def finished(**changed: Any) -> dict[str, Any]:
    """What `summary.json` has of a run."""
    return {
        "eval_loss_before": 2.0,
        "eval_loss_after": 1.0,
        "scores": None,
        "config": {
            "eval": {"metric": None, "answer_pattern": None, "max_new_tokens": 64},
            "train": {"learning_rate": 0.05},
        },
        "method": {"name": "paca"},
        "counts": "tokens",
        "steps": 2,
        "peak_memory_of": "tensors",
        **dict.fromkeys(("train_seconds", "seconds", "tokens_per_second", "peak_memory_bytes"), 1),
        **changed,
    }


def shown_of(summary: dict[str, Any]) -> str:
    shown = io.StringIO()
    show_result(RunResult(Path("run"), summary, None), Console(file=shown, width=300))
    return shown.getvalue()


ACCURACY = {"after": {"accuracy": 0.5, "accuracy_stderr": 0.1}}


@pytest.mark.parametrize(
    ("before", "after", "scores", "told"),
    [(2.0, 2.5, None, True), (2.0, 1.0, None, False), (None, 2.5, None, False), (2.0, 2.5, ACCURACY, False)],
    ids=["rose", "fell", "not measured before", "a score says more"],
)
def test_a_loss_that_rose_is_told_with_what_to_try(
    before: float | None, after: float, scores: dict[str, Any] | None, told: bool
) -> None:
    shown = shown_of(finished(eval_loss_before=before, eval_loss_after=after, scores=scores))
    assert ("The held-out loss rose: " in shown) == told
    assert ("Try a lower train.learning_rate (now 0.05), more data or fewer epochs." in shown) == told


def test_a_probe_in_a_dry_run_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, "train", "missing.yaml", "--dry-run", "--probe")
    assert caught.value.code == 1
    assert "--probe runs a batch, and --dry-run stops before anything is run." in capsys.readouterr().err


@pytest.mark.parametrize(("score", "pattern", "told"), [(0.0, None, True), (0.1, None, False), (0.0, "#", False)])
def test_answers_none_of_which_is_right_point_to_what_is_compared(
    score: float, pattern: str | None, told: bool
) -> None:
    side = {"exact_match": score, "exact_match_stderr": None, "examples": 6, "samples": []}
    summary = finished(
        scores={"before": side, "after": side},
        config={"eval": {"metric": "exact_match", "answer_pattern": pattern, "max_new_tokens": 64}},
        **({} if pattern else {"scores_seconds": 240}),
    )
    shown = shown_of(summary)
    hint = "No answer is its whole reference, which exact_match compares; answers end after 64 tokens"
    assert (hint in shown) == told
    assert (" 4:00 more for exact_match\n" in shown) == (pattern is None)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, "--version")
    assert not caught.value.code
    assert re.fullmatch(r"paca \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACA_DEBUG", "1")
    with pytest.raises(PacaError, match=r"There is no file missing\.yaml\."):
        run_main(monkeypatch, "train", "missing.yaml")


def test_a_damaged_weights_file_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workspace: Path, tmp_path: Path
) -> None:
    shutil.copytree(workspace / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    data = f"data.train={workspace / 'train.jsonl'}"
    target = f"output.dir={tmp_path / 'run'}"
    with pytest.raises(SystemExit) as caught:
        run_main(
            monkeypatch, "train", str(workspace / "config.yaml"),
            "--set", f"model.name={tmp_path / 'model'}", "--set", data, "--set", target,
        )  # fmt: skip
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Error: ")
    assert str(tmp_path / "model") in errors

"""`paca train`, each time as a process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from paca.cli import main
from paca.errors import PacaError
from paca.training import load_run_config, train
from training.tiny_run import curve, rows, same_adapter, save_workspace

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MAIN = "from paca.cli import main; main()"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    ENVIRONMENT["HF_DATASETS_CACHE"] = str(folder / "datasets-cache")
    save_workspace(folder)
    return folder


def start(workspace: Path, *arguments: str, launcher: tuple[str, ...] = ("-c", MAIN)) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=workspace,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def paca(workspace: Path, *arguments: str, launcher: tuple[str, ...] = ("-c", MAIN)) -> tuple[int, str, str]:
    process = start(workspace, *arguments, launcher=launcher)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def test_a_dry_run_shows_the_resolved_run_and_leaves_nothing(workspace: Path) -> None:
    status, output, errors = paca(workspace, "train", "config.yaml", "--dry-run", "--set", "output.dir=dry")
    assert (status, errors) == (0, "")
    resolved = yaml.safe_load(output[: output.index("\nmodel  ")])
    assert resolved["paca"]["r"] == 4
    assert resolved["train"]["lr_scheduler_type"] == "cosine"
    assert re.search(r"^targets +q_proj, .* 14 layers$", output, re.MULTILINE)
    assert re.search(r"^trainable parameters +\d[\d,]+ \(", output, re.MULTILINE)
    assert re.search(r"^tokens per step +at most 512 ", output, re.MULTILINE)
    assert re.search(r"^steps +10$", output, re.MULTILINE)
    assert not (workspace / "dry").exists()


def test_a_real_interrupt_saves_and_the_resumed_run_ends_as_the_uninterrupted_one(workspace: Path) -> None:
    steps = ["--set", "train.max_steps=150", "--set"]
    status, output, errors = paca(workspace, "train", "config.yaml", *steps, "output.dir=whole")
    assert status == 0, errors
    assert re.search(r"^step 0: held-out loss \d\.\d+$", output, re.MULTILINE)
    assert re.search(r"^step 150/150  loss \d\.\d+  [\d,]+ tokens/s  peak .*iB  0:00 left$", output, re.MULTILINE)
    assert re.search(r"^held-out loss +\d\.\d+ → \d\.\d+$", output, re.MULTILINE)
    assert (workspace / "whole" / "report.html").read_text().count("<svg") == 5
    assert "it/s]" not in output + errors  # no progress bars in a log file

    process = start(workspace, "train", "config.yaml", *steps, "output.dir=parts")
    metrics = workspace / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stopped_at = rows(workspace / "parts")[-1]["step"]
    assert stopped_at < 150
    assert (workspace / "parts" / "checkpoints" / f"checkpoint-{stopped_at}").is_dir()
    command = f"paca train {workspace / 'parts' / 'config.yaml'} --resume"
    assert f"Continue with:\n  {command}\n" in output

    status, output, errors = paca(workspace, *command.split()[1:])
    assert status == 0, errors
    assert f"Resuming after step {stopped_at} of 150." in output
    assert same_adapter(workspace / "whole", workspace / "parts")
    assert curve(workspace / "whole") == curve(workspace / "parts")
    summary = json.loads((workspace / "parts" / "summary.json").read_text())
    assert summary["command"].endswith("config.yaml --resume")


def test_two_processes_train_as_one_on_the_whole_batch_and_only_the_first_speaks(workspace: Path) -> None:
    # Plain SGD without dropout: nothing amplifies the rounding by which the two sums differ.
    model_config = workspace / "model" / "config.json"
    before = model_config.read_text()
    model_config.write_text(json.dumps(json.loads(before) | {"attention_dropout": 0.0}))
    common = ["--set", "train.optim=sgd", "--set", "train.learning_rate=1.0", "--set", "train.max_steps=10"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = workspace / "paca_program.py"
    program.write_text(MAIN)
    try:
        status, output, errors = paca(
            workspace, "train", "config.yaml", "--probe", *common, "--set", "output.dir=two",
            launcher=(*torchrun, str(program)),
        )  # fmt: skip
        assert status == 0, errors
        assert output.count("step 10/10") == 1
        assert output.count("The longest batch (2 x ") == 1
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
    status, output, errors = paca(workspace, "train", *arguments)
    assert (status, output) == (1, "")
    assert errors.startswith("Error: ")
    assert message in errors
    assert errors.count("\n") == 1


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paca", *arguments])
    main()


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

"""`train.report_to`: what trackers get of a run, with a tracker of our own and with the real ones."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from paca.messages.errors import PacaError
from paca.training import RunResult, load_run_config, run, train
from paca.training.folder import found_runs
from paca.training.folder.found_runs import find_runs
from paca.training.reporting import runs_page, tracking
from paca.training.reporting.runs_page import _Page, show_runs
from training.test_run import SignalAtStep
from training.tiny_run import rows
from training.written_run import write_run

QUESTION = {"question": "Is | it?", "reference": "yes"}


class Scores:
    """Stands for `paca.evaluation.own_data.scorer`."""

    calls = 0

    def check(self, rows: Any, model: Any) -> None:
        """Takes all."""

    def score(self, model: Any, tokenizer: Any, rows: Any, when: str) -> dict[str, Any]:
        self.calls += 1
        answer = {**QUESTION, "answer": ("no", "yes")[self.calls - 1]}
        return {"choice": self.calls / 2, "choice_stderr": 0.1, "examples": 8, "samples": [answer]}


class Recorder(TrainerCallback):
    """A tracker that keeps what it gets."""

    events: ClassVar[list[str]] = []
    logs: ClassVar[list[dict[str, Any]]] = []
    fails_at: ClassVar[str | None] = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fails_at == "begin":
            raise RuntimeError("no login\nmore of it")
        self.events.append(f"begin {args.run_name} in {args.project}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.fails_at == "finish" and "run_seconds" in logs:
            raise RuntimeError("no network")
        self.logs.append({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("end")


Start = Callable[..., RunResult]


@pytest.fixture
def start(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Trains two steps with a tracker."""
    monkeypatch.setattr(run, "StopOnSignal", SignalAtStep)

    def begin(tracker: str, *overrides: str, scored: bool = True, resume: bool = False, stop_at: int = -1) -> RunResult:
        monkeypatch.setattr(SignalAtStep, "step", stop_at)
        settings = [f"output.dir={tmp_path / 'answers'}", "train.max_steps=2", f"train.report_to={tracker}"]
        settings += ["eval.metric=choice", "data.eval=2"] if scored else ["data.eval=null"]
        config = load_run_config(config_file, [*settings, *overrides])
        return train(config, resume=resume, console=Console(quiet=True), scorer=Scores() if scored else None)

    return begin


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Recorder)
    monkeypatch.setattr(tracking, "get_available_reporting_integrations", lambda: ["mlflow"])
    monkeypatch.setattr(Recorder, "events", [])
    monkeypatch.setattr(Recorder, "logs", [])
    return Recorder


def test_a_tracker_gets_one_row_a_step_with_pacas_figures_and_the_results(start: Start, recorder: Any) -> None:
    result = start("mlflow")
    begun, ended = recorder.events
    assert begun.startswith("begin answers 2")
    assert begun.endswith(" in paca")
    assert ended == "end"
    training = [row for row in recorder.logs if "loss" in row]
    own = [row for row in rows(result.folder) if "loss" in row]
    assert len(training) == len(own) == 2
    for told, kept in zip(training, own, strict=True):
        for name in ("step", "loss", "tokens", "tokens_per_second"):
            assert told[name] == kept[name]
        assert told["peak_memory_gib"] == kept["peak_memory_bytes"] / 2**30
    assert [row["step"] for row in recorder.logs if "eval_loss" in row] == [0, 1, 2]
    last = recorder.logs[-1]
    assert result.summary is not None
    assert (last["eval_choice_before"], last["eval_choice_after"]) == (0.5, 1.0)
    assert last["run_tokens_per_second"] == result.summary["tokens_per_second"]
    assert last["run_peak_memory_gib"] == result.summary["peak_memory_bytes"] / 2**30


def test_a_stopped_run_closes_its_tracker_and_goes_on_under_the_same_name(start: Start, recorder: Any) -> None:
    assert start("mlflow", scored=False, stop_at=1).summary is None
    assert recorder.events[1:] == ["end"]
    start("mlflow", scored=False, resume=True)
    assert recorder.events[2:] == recorder.events[:2]
    assert [row["step"] for row in recorder.logs if "loss" in row] == [1, 2]


def test_a_tracker_that_cannot_start_is_one_message(
    start: Start, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "fails_at", "begin")
    with pytest.raises(PacaError, match=r"^train\.report_to: mlflow can't be started: no login See to it, or leave"):
        start("mlflow", scored=False)


def test_a_run_is_finished_though_a_tracker_does_not_take_its_results(
    start: Start, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "fails_at", "finish")
    assert (start("mlflow", "train.max_steps=1", scored=False).folder / "summary.json").is_file()
    assert recorder.events[1:] == ["end"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorboard", 'train.report_to: tensorboard is not installed. Install paca\'s extra .*"./paca.tensorboard."'),
        ("[none, trackio]", "line 3: train.report_to: trackio is not installed"),
        ("mlflow", "the package for mlflow is not installed"),
        ("tensorbord", "there is no tracker tensorbord. .* Did you mean tensorboard?"),
    ],
)
def test_a_tracker_that_is_missing_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.setattr(tracking, "get_available_reporting_integrations", list)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{name: no/model}}\ndata: {{train: no/data}}\ntrain: {{report_to: {given}}}\n")
    with pytest.raises(PacaError, match=message):
        load_run_config(file)


def test_tensorboard_shows_the_run(start: Start, tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
    )
    start("tensorboard", "train.max_steps=3", "train.save_steps=1", stop_at=2)
    start("tensorboard", "train.max_steps=3", "train.save_steps=1", resume=True)
    events = accumulator.EventAccumulator(str(tmp_path / "answers" / "tensorboard"))
    events.Reload()
    kept = [row for row in rows(tmp_path / "answers") if "loss" in row]
    shown = events.Scalars("train/tokens_per_second")
    assert [(event.step, pytest.approx(event.value)) for event in shown] == [
        (row["step"], row["tokens_per_second"]) for row in kept
    ]
    assert {"train/loss", "train/peak_memory_gib", "eval/loss", "eval/choice_after"} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("eval/answers/text_summary")
    assert b"| Is \\| it? | yes | no | yes |" in text.tensor_proto.string_val[0]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trackio's, in a folder of this test."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        for folder in ("TRACKIO_DIR", "MEDIA_DIR"):
            if hasattr(sys.modules[name], folder):
                monkeypatch.setattr(sys.modules[name], folder, tmp_path / folder)
    assert tmp_path in utils.TRACKIO_DIR.parents
    return SQLiteStorage


def test_trackio_shows_the_run(start: Start, storage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = start("trackio", "train.run_name=tried")
    printed = capsys.readouterr().out
    assert "logged to" in printed
    assert "Uploading" not in printed  # nothing leaves this machine
    (record,) = storage.get_run_records("paca")
    assert record["name"] == "tried"
    logs = storage.get_logs("paca", "tried")
    told = {(log["train/global_step"], log["train/tokens"]) for log in logs if "train/tokens" in log}
    assert told == {(row["step"], row["tokens"]) for row in rows(result.folder) if "loss" in row}
    assert any(log.get("eval/choice_after") == 1.0 for log in logs)
    assert any("eval/answers" in log for log in logs)


def test_the_page_of_runs_follows_what_they_write(storage: Any, tmp_path: Path) -> None:
    import trackio

    run = write_run(tmp_path / "all" / "one", steps=3)
    page = _Page(tmp_path / "all", trackio)
    page.update()
    write_run(run, steps=5, scores={"after": {"choice": 1.0, "choice_stderr": None, "samples": []}})
    write_run(tmp_path / "all" / "more" / "two", steps=2)
    for number, broken in enumerate(("[1]\n", '{"a": 1}\n')):
        (tmp_path / "all" / f"broken{number}").mkdir()
        (tmp_path / "all" / f"broken{number}" / "metrics.jsonl").write_text(broken)
    for number, broken in enumerate(("[1]", '{"steps": 3}', "[" * 100_000)):
        damaged = write_run(tmp_path / "all" / f"damaged{number}", steps=1)
        (damaged / "summary.json").write_text(broken)
    (tmp_path / "all" / "gone").mkdir()
    (tmp_path / "all" / "gone" / "metrics.jsonl").symlink_to("removed")
    page.update()
    page.update()
    assert {record["name"] for record in storage.get_run_records("all")} == {"one", "more/two"}
    logs = storage.get_logs("all", "one")
    assert [log["step"] for log in logs if "train/loss" in log] == [1, 2, 3, 4, 5]
    assert [log["eval/loss"] for log in logs if "eval/loss" in log] == [3.0]
    assert [log["train/peak_memory_gib"] for log in logs if "train/peak_memory_gib" in log] == [0.5] * 5
    assert [log["eval/choice_after"] for log in logs if "eval/choice_after" in log] == [1.0]


def test_a_runs_settings_are_bounded_where_they_are_shown(tmp_path: Path) -> None:
    names = "abcdefghij"
    lines = ["  a: &a [x, x]\n", *(f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(names))]
    (tmp_path / "config.yaml").write_text("train:\n  lr: 0.1\n" + "".join(lines))  # 2 * 9**9 values in all
    found = runs_page._settings(tmp_path)
    assert found["train.lr"] == 0.1
    assert len(json.dumps(found)) < 2**22


def test_runs_are_found_in_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [write_run(tmp_path / name, steps=1) for name in ("a", "compared/runs/b", "compared/runs/c")]
    (tmp_path / "a" / "adapter").mkdir()
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "metrics.jsonl")
    assert find_runs(tmp_path) == found
    assert find_runs(tmp_path / "a") == found[:1]
    monkeypatch.setattr(found_runs, "find_spec", lambda name: None)
    with pytest.raises(PacaError, match=r'needs trackio and gradio\. Install .* pip install "\./paca\[runs\]"'):
        show_runs(tmp_path, port=None, say=print, browser=False)
    with pytest.raises(PacaError, match=r"There are no runs in .*adapter"):
        show_runs(tmp_path / "a" / "adapter", port=None, say=print, browser=False)
    with pytest.raises(PacaError, match=r"No such folder: .*comparet\. Did you mean '.*compared'\? Give a folder with"):
        show_runs(tmp_path / "comparet", port=None, say=print, browser=False)
    monkeypatch.setattr(found_runs, "find_spec", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PacaError, match=r"Port \d+ is taken\. Give another: --port NUMBER"):
            show_runs(tmp_path, port=taken.getsockname()[1], say=print, browser=False)


@pytest.mark.parametrize("key", [None, "short"])
def test_wandb_without_a_login_is_told_before_anything_is_loaded(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    """It was told after the held-out data had been measured."""
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("HOME", str(tmp_path))  # the key may be in ~/.netrc
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    monkeypatch.setattr(run, "prepare", None)
    told = r"^train\.report_to: wandb can't be started: .*API.key.* See to it \(`wandb login`\), set WANDB_MODE=offline"
    with pytest.raises(PacaError, match=told):
        start("[tensorboard, wandb]", scored=False)
    wandb.teardown()


@pytest.mark.slow(reason="starts the program anew")
def test_wandb_keeps_the_run_offline(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    start("wandb")
    (file,) = (tmp_path / "answers" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in (b"train/tokens_per_second", b"train/peak_memory_gib", b"eval/choice_after", b"eval/answers"):
        assert name in content
    assert json.loads((tmp_path / "answers" / "tracking.json").read_text())["id"] in file.name

"""A claim is one process's, and goes with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paca.comparison.training_process import TrainingProcess, failure_of
from paca.pretrained.claims import Claim
from paca.training.folder.run_folder import RunFolder

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_claim_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "claims" / "run.lock"
    with Claim(path) as claim:
        assert claim.take()
        assert not Claim(path).take()
        assert claim.holder().startswith(f"process {os.getpid()} on ")
    assert Claim(path).take()


def test_the_claim_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = holder(path)
    assert not Claim(path).take()
    process.kill()
    process.wait()
    assert Claim(path).take()


def test_a_forked_worker_neither_keeps_a_claim_nor_lets_it_go(tmp_path: Path) -> None:
    path, (ready, started), (ends, end) = tmp_path / "run.lock", os.pipe(), os.pipe()
    claim = Claim(path)
    assert claim.take()
    if (worker := os.fork()) == 0:
        os.close(end)
        os.write(started, b"!")
        os.read(ends, 1)
        os._exit(claim.in_place())
    try:
        os.read(ready, 1)
        assert not Claim(path).take()
        claim.release()  # as the end of this process would
        with Claim(path) as another:
            assert another.take()
    finally:
        os.close(end)
        assert os.waitpid(worker, 0)[1] == 0
        for descriptor in (ready, started, ends):
            os.close(descriptor)


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.lock"
    opened, real = [], os.open

    def open_and_lose_the_first(*arguments: Any, **options: Any) -> int:
        descriptor = real(*arguments, **options)
        if not opened:
            path.unlink()
        opened.append(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose_the_first)
    with Claim(path) as claim:
        assert claim.take()
        monkeypatch.undo()
        assert len(opened) == 2
        assert not Claim(path).take()


def test_waiting_for_a_claim_ends_when_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    process = holder(path)
    assert process.stdin is not None
    process.stdin.close()  # ends it, now or in a moment
    with Claim(path) as claim:
        assert claim.take(wait=True)
    process.wait()


def test_a_training_that_outlives_its_starter_keeps_the_claim(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    claim = Claim(tmp_path / "run.lock")
    assert claim.take()
    waits = (sys.executable, "-c", "import time; time.sleep(600)")
    process = TrainingProcess(tmp_path / "config.yaml", folder, claim, waits)
    claim.release()
    try:
        assert not Claim(tmp_path / "run.lock").take()
    finally:
        process.kill()
    assert Claim(tmp_path / "run.lock").take()


def test_the_newest_step_is_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with Claim(tmp_path / "run.lock") as claim:
        assert claim.take()
        process = TrainingProcess(tmp_path / "config.yaml", folder, claim, (sys.executable, "-c", ""))
    assert process.step() is None  # no file yet
    rows = [{"step": step, "loss": 1.0, "train_seconds": step / 2} for step in range(1, 1001)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder.metrics.write_text(text)
    assert process.step() == (1000, 500.0)
    folder.metrics.write_text(text + '{"step": 1000, "eval_loss": 1.0}\n' + '{"step": 1001, "train_sec')
    assert process.step() == (1000, 500.0)
    while not process.ended(10):
        pass


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('a line'); print('Error: too hot'); raise SystemExit(1)", "too hot"),
        (
            "print('Error: too hot:'); print('  line 17'); print('Open a window.'); exit(1)",
            "too hot: line 17 Open a window.",
        ),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("raise SystemExit(3)", "no message; exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, most likely because the machine ran out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ],
)
def test_a_failure_is_told_by_its_last_words(tmp_path: Path, program: str, message: str) -> None:
    folder = RunFolder(tmp_path / "run")
    with Claim(tmp_path / "run.lock") as claim:
        assert claim.take()
        process = TrainingProcess(tmp_path / "config.yaml", folder, claim, (sys.executable, "-c", program))
        while not process.ended(10):
            pass
    process.finish()
    failure = failure_of(folder)
    assert failure is not None
    assert failure["error_msg"] == message


def test_a_run_that_is_stopped_while_it_starts_has_not_failed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with Claim(tmp_path / "run.lock") as claim:
        assert claim.take()
        waits = (sys.executable, "-c", "import time; print('started', flush=True); time.sleep(600)")
        process = TrainingProcess(tmp_path / "config.yaml", folder, claim, waits)
        while process.log.read_text() != "started\n":
            assert not process.ended(0.01)
        process.stop()
    process.finish()
    assert failure_of(folder) is None

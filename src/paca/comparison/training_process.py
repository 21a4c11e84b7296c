"""`paca train` in a process of its own, so that its memory is its own and its crash ends nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paca.messages.disk import says_full
from paca.pretrained.claims import Claim
from paca.pretrained.out_of_memory import says_out_of_memory
from paca.pretrained.whole_output import write_whole
from paca.training.folder.run_folder import RunFolder, read_record

PROGRAM = (sys.executable, "-m", "paca_command")
FAILURE = "failed.json"
_TAIL = 4096  # bytes of a metrics file with its newest rows: the training is not to wait for who looks at it
_ERROR_LINES = 8
_INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)  # with its checkpoint saved, or before it had any


class TrainingProcess:
    """One run, going.

    It has a session of its own: Ctrl-C reaches this process alone, which passes it on once. `paca train` takes a
    second one for impatience.
    """

    def __init__(self, config: Path, folder: RunFolder, claim: Claim, program: Sequence[str] = PROGRAM) -> None:
        """Start it, or continue it from its newest checkpoint.

        Args:
            config: Its YAML, with `folder` as its `output.dir`.
            folder: Of the run. What the process prints is added to its `log.txt`.
            claim: On the run; the process holds it too.
            program: What runs `train CONFIG`.
        """
        self.folder = folder
        self.log = folder.path / "log.txt"
        resume = ["--resume"] if folder.newest_checkpoint() is not None else []
        folder.path.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._said_before = log.tell()
            self._process = subprocess.Popen(
                [*program, "train", str(config), *resume],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(claim.descriptor,),
            )

    def ended(self, seconds: float) -> bool:
        """Wait for its end, no longer than this; whether it came."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def step(self) -> tuple[int, float] | None:
        """The newest step that was logged and the seconds in training steps until then; None before the first."""
        with contextlib.suppress(OSError, ValueError), self.folder.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            for line in reversed(file.read().splitlines()):
                if b'"train_seconds"' in line:
                    row = json.loads(line)
                    return row["step"], row["train_seconds"]
        return None

    @property
    def interrupted(self) -> bool:
        """Whether it was asked to stop, by this process or by another one, and did."""
        return self._process.returncode in _INTERRUPTED

    def finish(self) -> None:
        """After its end: leave `failed.json` in the folder if it failed, and not because it was asked to stop."""
        if not self.interrupted and not self.folder.finished():
            write_whole(self.folder.path / FAILURE, json.dumps(self.failure(), indent=2) + "\n")

    def failure(self) -> dict[str, Any]:
        """After an end that was none of its own: its exit status, and why in words."""
        status = self._process.returncode
        return {"exit_status": status, "error_msg": self._last_words(status)}

    def stop(self) -> None:
        """Let it save a checkpoint and end; a further Ctrl-C stops it at once."""
        self._signal(signal.SIGINT)
        while True:
            try:
                self._process.wait()
                return
            except KeyboardInterrupt:
                self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End it at once, without a checkpoint."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self, status: int) -> str:
        with self.log.open("rb") as log:
            log.seek(self._said_before)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        if status < 0:
            hint = ", most likely because the machine ran out of memory" if -status == signal.SIGKILL else ""
            return f"killed by {signal.Signals(-status).name}{hint}"
        starts = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
        if starts:  # with its further lines: what to do comes last
            return " ".join(lines[starts[-1] : starts[-1] + _ERROR_LINES]).removeprefix("Error: ")
        return (lines or [f"no message; exit status {status}"])[-1]


def failure_of(folder: RunFolder) -> dict[str, Any] | None:
    """What `failed.json` says of a run that did not finish; None where there is none, or a damaged one."""
    found = {} if folder.finished() else read_record(folder.path / FAILURE)
    return found if {"exit_status", "error_msg"} <= found.keys() else None


def how_to_try_again(folder: RunFolder) -> str:
    """A sentence on how a run that failed is made again."""
    failure = failure_of(folder)
    if failure is None or _passes(failure):  # see `forget_what_passes`
        return "The same command tries it again."
    return f"To try it again, delete {folder.path / FAILURE} and give the same command again."


def ran_out_of_memory(failure: Mapping[str, Any]) -> bool:
    """Whether a failure, as `failure_of` has it, was one of memory; most likely so where the run was killed."""
    return failure["exit_status"] in (-signal.SIGKILL, 128 + signal.SIGKILL) or says_out_of_memory(failure["error_msg"])


def forget_what_passes(folder: RunFolder) -> None:
    """Let a run that a signal killed, as for want of memory, or that found the disk full, be taken up again from its
    newest checkpoint."""
    failure = failure_of(folder)
    if failure is not None and _passes(failure):
        (folder.path / FAILURE).unlink(missing_ok=True)


def _passes(failure: Mapping[str, Any]) -> bool:
    """Whether a failure was of the machine in that hour, and says nothing of the run."""
    return failure["exit_status"] < 0 or says_full(failure["error_msg"])

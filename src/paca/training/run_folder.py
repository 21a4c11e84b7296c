"""The run folder: the names of its parts, whether it is free, and its newest complete checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paca.messages.claims import Claim
from paca.messages.errors import PacaError

_NEEDED_TO_RESUME = ("trainer_state.json", "scheduler.pt")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")
"""By who saves it: one process or DDP, FSDP whole or in shards (a folder), DeepSpeed."""


class RunFolder:
    """The folder of one run, and the paths of its parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # resolved; it runs again as it is
        self.inputs = path / "inputs.json"  # hashes of the data and the template, for a run that is continued
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"  # written last: its presence says that the run is finished
        self.report = path / "report.html"
        self.adapter = path / "adapter"  # as PEFT stores it, and the tokenizer
        self.model = path / "model"  # in its place, where the whole model was trained
        self.columns = path / "columns.json"  # those chosen, and what they followed from: another run here uses them
        self.base = path / "base"  # the model of a GGUF file as a plain checkpoint
        self.checkpoints = path / "checkpoints"  # the trainer's own folder
        self.tracking = path / "tracking.json"  # the name that trackers know the run by, for one that is continued
        self.tensorboard = path / "tensorboard"
        self.lock = path / ".lock"  # held by the process that trains here

    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return self.summary.is_file()

    def read_summary(self) -> dict[str, Any]:
        """What the finished run wrote of itself."""
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step; one cut short while it was written does not count."""
        complete = [(step, path) for step, path in self._checkpoints() if _is_complete(path)]
        return max(complete)[1] if complete else None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other processes from training here meanwhile. A folder that is made for it goes if nothing came into it.

        Raises:
            PacaError: Another process trains here, or the folder can't be made.
        """
        made = not self.path.exists()
        try:
            claim = Claim(self.lock)
            taken = claim.take()
        except OSError as error:
            raise PacaError(f"The run folder {self.path} (output.dir) can't be made ready: {error}.") from error
        if not taken:
            raise PacaError(
                f"{self.path} is in use: {claim.holder()} trains there. Wait for its end, stop it, or give another "
                "output.dir."
            )
        with claim:
            try:
                yield
            finally:
                self.lock.unlink(missing_ok=True)
                if made and not any(self.path.iterdir()):
                    self.path.rmdir()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse to start a run over another one.

        Raises:
            PacaError: The folder holds a finished run or checkpoints, and `overwrite` is false.
        """
        if overwrite or not (self.finished() or self.newest_checkpoint() is not None):
            return
        if self.finished():
            state, remedy = "a finished run", "Give"
        else:
            state, remedy = "the checkpoints of an unfinished run", "Continue it with --resume, or give"
        raise PacaError(
            f"{self.path} already holds {state}. {remedy} another output.dir, or output.overwrite=true to start over."
        )

    def clear(self, inputs: dict[str, str]) -> None:
        """Make the folder, without the parts of an earlier run; other files in it stay.

        Args:
            inputs: Of the run that begins, from `inputs_of`.

        Raises:
            PacaError: It can't be made, or not be emptied.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.config, self.metrics, self.summary, self.report, self.tracking):
                file.unlink(missing_ok=True)
            for part in (self.adapter, self.model, self.base, self.checkpoints, self.tensorboard):
                if part.is_dir():
                    shutil.rmtree(part)
            write_whole(self.inputs, json.dumps(inputs))
        except OSError as error:
            raise PacaError(f"The run folder {self.path} (output.dir) can't be made ready: {error}.") from error

    def reopen(self) -> Path:
        """Find where to continue, and remove checkpoints that were cut short while they were written.

        Returns:
            The newest complete checkpoint.

        Raises:
            PacaError: There is nothing to continue.
        """
        newest = self.newest_checkpoint()
        if newest is None:
            raise PacaError(
                f"There is nothing to resume: {self.path} has no complete checkpoint. Run it without --resume."
            )
        for _, path in self._checkpoints():
            if not _is_complete(path):
                shutil.rmtree(path)
        return newest

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if not self.checkpoints.is_dir():
            return []
        found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.checkpoints.iterdir())
        return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def write_whole(path: Path, text: str) -> None:
    """Write a file in place of the one that is there, whole or not at all; make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the new name with nothing in it
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def steps_done(checkpoint: Path) -> int:
    """Steps made when the checkpoint was saved."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _is_complete(checkpoint: Path) -> bool:
    # The trainer writes its state last; a cut-off write leaves no such file or half a JSON document.
    if not all((checkpoint / name).is_file() for name in _NEEDED_TO_RESUME):
        return False
    if not any((checkpoint / name).exists() for name in _OPTIMIZER):
        return False
    try:
        steps_done(checkpoint)
    except (ValueError, KeyError):
        return False
    return True

"""The run folder: the names of its parts, whether it is free, and its newest complete checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paca.messages.disk import DiskError
from paca.messages.errors import PacaError
from paca.messages.program import resume_command
from paca.pretrained.claims import Claim
from paca.pretrained.whole_output import sync, sync_names, write_whole

_MARK = "whole.json"  # in a checkpoint: the sizes of its files, written when they are on the disk
_NAME = re.compile(r"(\.)?checkpoint-(\d+)(?(1)\.before)")  # with dot and ending: set aside


class RunFolder:
    """The folder of one run, and the paths of its parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # resolved; it runs again as it is
        self.inputs = path / "inputs.json"  # hashes of data, template and model, for a run that is continued
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"  # written last: its presence says that the run is finished
        self.report = path / "report.html"
        self.adapter = path / "adapter"  # as PEFT stores it, and the tokenizer
        self.model = path / "model"  # in its place, where the whole model was trained
        self.columns = path / "columns.json"  # those chosen, and what they followed from: another run here uses them
        self.start = path / "start.safetensors"  # what an adapter began with, where a checkpoint does not say it
        self.base = path / "base"  # the model of a GGUF file as a plain checkpoint
        self.checkpoints = path / "checkpoints"  # the trainer's own folder
        self.tracking = path / "tracking.json"  # the name that trackers know the run by, for one that is continued
        self.tensorboard = path / "tensorboard"
        self.lock = path / ".lock"  # held by the process that trains here
        self._claim: Claim | None = None

    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return self.summary.is_file()

    def read_summary(self) -> dict[str, Any]:
        """What the finished run wrote of itself."""
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def recorded_inputs(self) -> dict[str, str]:
        """Hashes of what the run's settings named, its data and its model among them; empty where they are unknown."""
        return {key: found for key, found in read_record(self.inputs).items() if isinstance(found, str)}

    def newest_checkpoint(self) -> Path | None:
        """The complete checkpoint of the highest step; one cut short while it was written does not count."""
        whole = [(step, path) for step, path in self._checkpoints() if _is_whole(path)]
        return max(whole)[1] if whole else None

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
            raise self._no_place(error) from error
        if not taken:
            raise PacaError(
                f"{self.path} is in use: {claim.holder()} trains there. Wait for its end, stop it, or give another "
                "output.dir."
            )
        with claim:
            self._claim = claim
            try:
                yield
            finally:
                there, self._claim = claim.in_place(), None
                if there:
                    self.lock.unlink(missing_ok=True)
                if there and made and not any(self.path.iterdir()):
                    self.path.rmdir()

    def check_writable(self) -> None:
        """Try to write where the folder is, or would be made, and leave nothing behind.

        Raises:
            PacaError: Nothing can be written there.
        """
        path = self.path.absolute()
        try:
            with tempfile.TemporaryFile(dir=next(place for place in (path, *path.parents) if place.exists())):
                pass
        except OSError as error:
            raise self._no_place(error) from error

    def _no_place(self, error: OSError) -> PacaError:
        reason = error.strerror or str(error)
        return PacaError(
            f"The run folder {self.path} (output.dir) can't be made or written: {reason[:1].lower()}{reason[1:]}. Give "
            "another output.dir, in a folder that you may write into."
        )

    def is_gone(self) -> bool:
        """Whether it was deleted or moved while this process has it in use."""
        return self._claim is not None and not self._claim.in_place()

    def check_there(self) -> None:
        """Refuse to go on in a folder that was deleted or moved while it is in use: what is written would make another.

        Raises:
            DiskError: It is not there any more.
        """
        if self.is_gone():
            raise DiskError(f"The run folder {self.path} is gone: it was moved or deleted while the run was going.")

    def check_free(self, *, overwrite: bool, used: Iterable[tuple[str, str]] = ()) -> None:
        """Refuse to start a run over another one, and over what no run has written.

        Args:
            overwrite: A run that is there may go.
            used: What the new run reads: keys of its config, and paths.

        Raises:
            PacaError: The folder holds a finished run or checkpoints, and `overwrite` is false; or what `clear` would
                remove is no run's, or is used.
        """
        self._check_own(used)
        if overwrite or not (self.finished() or self.newest_checkpoint() is not None):
            return
        state, first = "a finished run", "Give"
        if not self.finished():
            state = "the checkpoints of an unfinished run"
            first = f"Continue it with --resume and the same settings ({resume_command(self.config)}), or give"
        raise PacaError(
            f"{self.path} already holds {state}. {first} another output.dir, or start over with "
            "--set output.overwrite=true."
        )

    def _check_own(self, used: Iterable[tuple[str, str]]) -> None:
        there = [path for path in (*self._files(), self.config, *self._parts()) if path.exists()]
        known = self.inputs.is_file() or self.finished() or self.newest_checkpoint() is not None
        if there and not known:
            raise PacaError(
                f"{self.path} is no folder of a run, and holds {', '.join(path.name for path in there)}, which a run "
                "would replace. Give another output.dir."
            )
        replaced = [part.resolve() for part in (*self._parts(), *self._files()) if part.exists()]
        for key, name in used:
            path = Path(name).expanduser().resolve()  # the folder of a run stands for the model in it
            if any(path.is_relative_to(part) for part in replaced) or (replaced and path == self.path.resolve()):
                raise PacaError(
                    f"{key} is {name}, in the folder of an earlier run that this one would replace. Give another "
                    "output.dir."
                )

    def _files(self) -> tuple[Path, ...]:
        return self.metrics, self.summary, self.report, self.tracking, self.start

    def _parts(self) -> tuple[Path, ...]:
        return self.adapter, self.model, self.base, self.checkpoints, self.tensorboard

    def clear(self, inputs: dict[str, str]) -> None:
        """Make the folder, without the parts of an earlier run. Other files in it stay, and its config for now.

        Args:
            inputs: Of the run that begins, from `inputs_of`.

        Raises:
            PacaError: It can't be made, or not be emptied.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in self._files():
                file.unlink(missing_ok=True)
            for part in self._parts():
                if part.is_dir():
                    shutil.rmtree(part)
            self.drop_what_was_cut_short()
            write_whole(self.inputs, json.dumps(inputs))
        except OSError as error:
            raise self._no_place(error) from error

    def reopen(self) -> Path:
        """Find where to continue, and remove checkpoints that were cut short while they were written.

        Returns:
            The newest complete checkpoint.

        Raises:
            PacaError: There is nothing to continue.
        """
        if self.newest_checkpoint() is not None:
            self.drop_what_was_cut_short()
        newest = self.newest_checkpoint()
        if newest is None:
            raise PacaError(
                f"There is nothing to resume: {self.path} has no complete checkpoint. Run it without --resume."
            )
        return newest

    def drop_what_was_cut_short(self) -> None:
        """Remove what is no whole checkpoint, and files that were written beside their place."""
        for _, path in self._checkpoints():
            if not _is_whole(path):
                shutil.rmtree(path)
        for _, path in self._checkpoints():
            if path == _aside(path):
                continue
            shutil.rmtree(_aside(path), ignore_errors=True)
        for step, path in self._checkpoints():
            os.replace(path, self.checkpoint(step))
        for path in self.path.glob(".*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def checkpoint(self, step: int) -> Path:
        """Where the trainer saves after `step` steps."""
        return self.checkpoints / f"checkpoint-{step}"

    def set_aside(self, step: int) -> None:
        """Keep the checkpoint of `step`, if there is one, while it is written anew: until then it is the newest."""
        path = self.checkpoint(step)
        if _is_whole(path):
            os.replace(path, _aside(path))

    def mark_whole(self, step: int, *, to_resume: bool = True) -> None:
        """Say that the checkpoint of `step` is all there, once it is on the disk.

        One that can't be resumed from, since it lacks the optimizer, is not marked.
        """
        path = self.checkpoint(step)
        sync(path)
        sync_names(self.checkpoints)  # the folder's own name: older checkpoints go once this one is marked
        if not to_resume:
            return
        files = [file for file in path.rglob("*") if file.is_file() and file.name != _MARK]
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
        write_whole(path / _MARK, json.dumps(sizes, indent=2) + "\n")
        shutil.rmtree(_aside(path), ignore_errors=True)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if not self.checkpoints.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.checkpoints.iterdir())
        return [(int(match[2]), path) for match, path in found if match and path.is_dir()]


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a run keeps for itself; empty where it is not there, or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def steps_done(checkpoint: Path) -> int:
    """Steps made when the checkpoint was saved."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file is there that was there when the checkpoint was complete, and as long as it was."""
    try:
        sizes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name.removeprefix('.').removesuffix('.before')}.before")

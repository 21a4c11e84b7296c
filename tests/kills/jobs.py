"""What is killed: a run until its end, a merge, an export. Each is looked at after every kill, and at its end."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from kills.killed_child import Point, run_and_kill
from paca.convert.adapter import read_adapter
from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import find_adapter
from paca.training import load_run_config, train
from paca.training.folder.run_folder import RunFolder
from training.tiny_run import curve, same_adapter

RUNS = {
    "plain": ("train.max_steps=6", "train.save_steps=2", "train.eval_steps=3", "train.save_total_limit=1"),
    "rotating": ("train.max_steps=6", "train.save_steps=2", "paca.rotate_every=2", "data.eval=null"),
    "epochs": ("train.max_steps=10", "train.save_steps=4", "train.eval_strategy=epoch", "train.save_total_limit=1"),
}
"""Settings of the runs that are killed: few steps, and checkpoints among them. An epoch of `epochs` has 8 steps."""


class Chances:
    """Draws the points of kills, seeded."""

    def __init__(self, seed: int, *, timed: bool) -> None:
        """Args:
        seed: Of the draws.
        timed: Whether some kills come after a time, which no seed repeats.
        """
        self._random = random.Random(seed)
        self._kinds = ("call", "call", "byte", "time") if timed else ("call", "call", "byte")

    def point(self, calls: int, sizes: list[int], seconds: float) -> Point:
        """One of a job that makes so many calls, writes files of such sizes, and takes so long."""
        kind = self._random.choice(self._kinds)
        if kind == "call":
            return Point("call", self._random.randint(1, calls))
        if kind == "byte":
            return Point("byte", self._random.randrange(self._random.choice(sizes)))
        return Point("time", self._random.uniform(0, seconds))


class KilledRun:
    """A run that is killed again and again until it ends, and its uninterrupted twin."""

    def __init__(self, config: Path, folder: Path, name: str, chances: Chances, counts: Counter[str]) -> None:
        """Args:
        config: Of `save_workspace`.
        folder: Made here, for both runs.
        name: Of the settings, in `RUNS`.
        chances: Of being killed.
        counts: Gets what was killed, and where.
        """
        self.config, self.name, self.chances, self.counts = config, name, chances, counts
        self.folder, self.killed = folder, folder / "killed"
        self.settings = (*RUNS[name], "train.learning_rate=1e-2")
        folder.mkdir(parents=True)
        ended = run_and_kill(lambda: self._train("every", "train.save_total_limit=100"), folder, None, self._log)
        self.calls, self.seconds = ended.calls, ended.seconds
        self.whole = folder / "every"
        self.sizes = sorted({file.stat().st_size for file in self.whole.rglob("*") if file.is_file()} - {0})

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    def _train(self, name: str, *more: str) -> None:
        folder = RunFolder(self.folder / name)
        settings = [*self.settings, *more, f"output.dir={folder.path}"]
        resume = folder.newest_checkpoint() is not None
        train(load_run_config(self.config, settings), resume=resume, console=Console(quiet=True))

    def kill_until_done(self, kills: int) -> int:
        """Start it, kill it, resume it, at most so many times; then let it end, and compare. Returns the kills."""
        shutil.rmtree(self.killed, ignore_errors=True)
        done = 0
        while done < kills and not RunFolder(self.killed).finished():
            point = self.chances.point(self.calls, self.sizes, self.seconds)
            if run_and_kill(lambda: self._train("killed"), self.killed, point, self._log).killed:
                done += 1
                self.counts[f"{self.name} run, {point.kind}, {self._stage()}"] += 1
            self.look()
        run_and_kill(lambda: self._train("killed"), self.killed, None, self._log)
        self.look()
        assert RunFolder(self.killed).finished()
        assert same_adapter(self.whole, self.killed)
        assert curve(self.whole) == curve(self.killed)
        hidden = {path.name for path in self.killed.iterdir() if path.name.startswith(".")}
        assert hidden <= {".lock"}  # nobody's: of one that was killed when all was done
        return done

    def _stage(self) -> str:
        """Where it was killed, as far as the folder shows it."""
        folder = RunFolder(self.killed)
        if folder.finished():
            return "after the end"
        if folder.adapter.exists() or (self.killed / ".adapter.partial").exists():
            return "final saving"
        newest = folder.newest_checkpoint()
        found = [*folder.checkpoints.glob("*checkpoint-*")] if folder.checkpoints.is_dir() else []
        if any(path != newest for path in found):
            return "a checkpoint half written, or removed"
        return "training" if folder.metrics.exists() else "before training"

    def look(self) -> None:
        """What is there is whole, or is not taken for it."""
        folder = RunFolder(self.killed)
        if folder.config.exists():
            yaml.safe_load(folder.config.read_text())["paca"]
        if folder.inputs.exists():
            json.loads(folder.inputs.read_text())
        if folder.finished():
            assert folder.read_summary()["steps"] > 0
            assert folder.adapter.exists()
        if folder.adapter.exists():
            assert find_adapter(folder.path) == folder.adapter
            assert same_adapter(self.whole, self.killed)
            read_adapter(folder.adapter)
        elif folder.path.exists():
            with pytest.raises(PacaError):
                find_adapter(folder.path)
        newest = folder.newest_checkpoint()
        if newest is not None:
            twin = RunFolder(self.whole).checkpoint(int(newest.name.strip(".").split("-")[1].split(".")[0]))
            names = {path.name for path in twin.iterdir()}
            assert names == {path.name for path in newest.iterdir()}
            for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
                assert equal(read(twin / name), read(newest / name)), name


class KilledOutput:
    """A merge or an export that is killed while it replaces another one."""

    def __init__(self, name: str, work: Callable[[Path], Any], folder: Path, chances: Chances, counts: Counter[str]):
        """Args:
        name: Of the job.
        work: Writes it to a place, anew.
        folder: Made here.
        chances: Of being killed.
        counts: Gets what was killed, and where.
        """
        self.name, self.work, self.folder, self.chances, self.counts = name, work, folder, chances, counts
        folder.mkdir(parents=True)
        self.output = folder / "places" / ("out.gguf" if name.endswith("gguf") else "out")
        self.output.parent.mkdir()
        ended = run_and_kill(lambda: work(self.output), self.output.parent, None, folder / "log.txt")
        self.calls, self.seconds = ended.calls, ended.seconds
        self.whole = contents(self.output)
        self.sizes = [len(content) for content in self.whole.values() if content]

    def kill(self) -> int:
        """Kill it once, look, and let it run to its end. Returns the kills."""
        point = self.chances.point(self.calls, self.sizes, self.seconds)
        if self.output.is_dir():  # the one that is replaced is told from the new one
            (self.output / "old").touch()
        elif self.output.exists():
            self.output.write_bytes(b"old")
        before = contents(self.output)
        places = self.output.parent
        ended = run_and_kill(lambda: self.work(self.output), places, point, self.folder / "log.txt")
        if self.output.exists():
            assert contents(self.output) in (before, self.whole), point
        if ended.killed:
            state = "the old one there" if contents(self.output) == before else "the new one there"
            if not self.output.exists():
                state = "between the two"
            self.counts[f"{self.name}, {point.kind}, {state}"] += 1
        run_and_kill(lambda: self.work(self.output), places, None, self.folder / "log.txt")
        now = contents(self.output)
        different = [name for name in now.keys() | self.whole.keys() if now.get(name) != self.whole.get(name)]
        assert not different, (self.name, point, different)
        assert [*places.iterdir()] == [self.output]
        return int(ended.killed)


def outputs(run: Path, folder: Path, chances: Chances, counts: Counter[str]) -> list[KilledOutput]:
    """A merge and exports of a finished run."""
    jobs: dict[str, Callable[[Path], Any]] = {
        "merge": lambda output: merge_to_folder(run, output, overwrite=True),
        "export to lora": lambda output: export_adapter(run, output, "lora", overwrite=True),
        "export to gguf": lambda output: export_adapter(run, output, "gguf", overwrite=True),
    }
    return [KilledOutput(name, work, folder / name.split()[-1], chances, counts) for name, work in jobs.items()]


def contents(path: Path) -> dict[str, bytes]:
    """Of a file, or of all files of a folder; nothing of what is not there."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): content_of(file) for file in path.rglob("*") if file.is_file()}


def content_of(file: Path) -> bytes:
    """The bytes of a file; the names in a safetensors file's header, which come in any order, sorted."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    length = int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode() + content[8 + length :]


def read(path: Path) -> Any:
    """What a checkpoint's file holds."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def equal(one: Any, other: Any) -> bool:
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other

"""Runs that are killed, that find no room, or whose folder goes: what is left is whole, and ends at the same bits."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from endurance.steps import train_and_look
from kills.jobs import Chances, KilledRun, outputs
from kills.killed_child import Point
from paca.messages.disk import DiskError
from paca.training import RunResult, load_run_config, train
from paca.training.folder.checkpoints import WholeCheckpoints
from paca.training.folder.run_folder import RunFolder
from paca.training.reporting.metrics import RecordMetrics
from training.tiny_run import curve, same_adapter

SETTINGS = ("train.max_steps=6", "train.save_steps=2", "data.eval=null")


def go(config_file: Path, folder: Path, *, resume: bool = False) -> RunResult:
    settings = load_run_config(config_file, [f"output.dir={folder}", *SETTINGS])
    return train(settings, resume=resume, console=Console(quiet=True))


class Given(Chances):
    """Kills at the given shares of all calls, or of the largest file."""

    def __init__(self, *points: tuple[str, float]) -> None:
        self.points = [*points]

    def point(self, calls: int, sizes: list[int], seconds: float) -> Point:
        kind, share = self.points.pop(0)
        return Point(kind, int(share * (calls if kind == "call" else max(sizes))))  # type: ignore[arg-type]


@pytest.mark.slow(reason="starts the program anew")
def test_killed_again_and_again_everything_is_whole_and_ends_the_same(config_file: Path, tmp_path: Path) -> None:
    """The long form is `make kills`."""
    counts: Counter[str] = Counter()
    points = Given(("call", 0.2), ("call", 0.25), ("call", 0.25), ("byte", 0.1), ("byte", 0.5))
    run = KilledRun(config_file, tmp_path / "run", "plain", points, counts)
    kills = run.kill_until_done(5)
    lora = outputs(run.whole, tmp_path / "outputs", points, counts)[1]
    for points.points in ([("byte", 0.5)], [("call", 0.95)]):
        kills += lora.kill()
    assert kills >= 5, counts


def test_a_checkpoint_at_the_end_of_an_evaluated_epoch_comes_after_the_evaluation(tmp_path: Path) -> None:
    """Evaluation draws from the random state that a checkpoint holds, and a resumed run does not repeat it."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", eval_strategy="epoch")
    checkpoints = WholeCheckpoints(RunFolder(tmp_path), arguments)
    for epoch, waits in ((0.5, False), (1.0, True), (1.5, False), (2.0, True)):
        state, control = TrainerState(epoch=epoch, global_step=8), TrainerControl(should_save=True)
        checkpoints.on_step_end(arguments, state, control)
        assert control.should_save is not waits
        if waits:
            checkpoints.on_epoch_end(arguments, state, control)
            assert control.should_save


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From the optimizer's state after `step` steps on, nothing can be saved any more, as torch says it."""
    save = torch.save

    def refuse(content: Any, file: Any, *args: Any, **options: Any) -> None:
        if f"checkpoint-{step}/optimizer" not in str(file):
            return save(content, file, *args, **options)
        Path(file).write_text("half")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30, 2048))  # type: ignore[attr-defined]
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", refuse)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    config_file: Path, finished: Callable[..., RunResult], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, 4)
        with pytest.raises(DiskError) as caught:
            go(config_file, folder.path)
    said = str(caught.value)
    assert said.startswith(f"The disk is full: {folder.checkpoint(4)} could not be written. It takes about ")
    assert ", and 2.00 KiB is free in " in said
    assert " is missing. When that is mended, go on from checkpoint-2: " in said
    assert "\n" not in said
    assert [path.name for path in folder.checkpoints.glob("*checkpoint*")] == ["checkpoint-2"]
    go(config_file, folder.path, resume=True)
    whole = finished(*SETTINGS).folder
    assert same_adapter(whole, folder.path)
    assert curve(whole) == curve(folder.path)


@pytest.mark.parametrize("place", ["metrics", "checkpoint"])
def test_a_folder_that_disappears_is_one_line_and_none_is_made_in_its_place(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    kind, name = (RecordMetrics, "on_log") if place == "metrics" else (WholeCheckpoints, "on_step_end")
    before = getattr(kind, name)

    def disappear(self: Any, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step == 2:
            shutil.rmtree(tmp_path / "run")
        before(self, args, state, control, **more)

    monkeypatch.setattr(kind, name, disappear)
    with pytest.raises(DiskError, match=r"gone.* Its checkpoints went with it\. If it was moved to NEW, .* --resume"):
        go(config_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_moved_goes_on_where_it_is(
    config_file: Path, finished: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = WholeCheckpoints.on_step_end

    def move(self: Any, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step == 4:
            (tmp_path / "run").rename(tmp_path / "moved")
        before(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(WholeCheckpoints, "on_step_end", move)
        with pytest.raises(DiskError) as caught:
            go(config_file, tmp_path / "run")
    told = str(caught.value).partition(" go on from there: ")[2].replace("NEW", str(tmp_path / "moved"))
    _, _, config, resume, _, folder = shlex.split(told)
    assert resume == "--resume"
    train(load_run_config(config, [folder]), resume=True, console=Console(quiet=True))
    assert same_adapter(finished(*SETTINGS).folder, tmp_path / "moved")


def test_a_folder_without_permission_is_one_line(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def refuse(path: Any, *args: Any, **options: Any) -> None:  # root may write everywhere
        if str(path).endswith("checkpoint-4"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    message = r"checkpoint-4 could not be opened or written: permission denied\. .*go on from checkpoint-2"
    with pytest.raises(DiskError, match=message):
        go(config_file, tmp_path / "run")


@pytest.mark.slow(reason="measures the memory of processes")
def test_thirty_steps_leave_memory_as_it_is_and_every_column_what_its_delta_says() -> None:
    """The long form is `make endurance`: 2,000 steps, twice."""
    first, second = (train_and_look(30, moments=3) for _ in range(2))
    assert first.layers == 14
    assert len(set(first.tensor_bytes)) == 1
    assert first.hash == second.hash

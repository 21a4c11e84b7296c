from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from forked_process import start_forked
from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import find_adapter
from paca.pretrained.claims import holder_of
from paca.pretrained.whole_output import write_whole
from paca.training.folder.run_folder import RunFolder, steps_done

pytestmark = pytest.mark.usefixtures("in_time")

TRAIN = """
import sys, time
from pathlib import Path
from paca.training.folder.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).in_use():
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def trained_elsewhere(folder: Path, streams: Path) -> Iterator[BaseProcess]:
    """A process that has the folder in use."""
    process = start_forked(TRAIN, folder, streams=streams)
    try:
        end = time.monotonic() + 60
        while not (streams / "stdout").exists() or (streams / "stdout").read_text() != "held\n":
            assert process.exitcode is None, (streams / "stderr").read_text()
            assert time.monotonic() < end, "the process does not get the folder"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join(60)


def checkpoint(folder: RunFolder, step: int, *, whole: bool = True) -> Path:
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "adapter_model.safetensors"):
        (path / name).write_text("whole")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if whole:
        folder.mark_whole(step)
    return path


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    for step in (10, 9, 100):
        checkpoint(folder, step)
    (folder.checkpoints / "checkpoint-9999.bak").mkdir()
    newest = folder.newest_checkpoint()
    assert newest == folder.checkpoints / "checkpoint-100"
    assert steps_done(newest) == 100


def test_checkpoints_cut_short_are_passed_over_and_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good = checkpoint(folder, 10)
    (good / "added later").touch()
    unmarked, shorter, lacking, half_marked = (
        checkpoint(folder, 20, whole=False),
        *(checkpoint(folder, step) for step in (30, 40, 50)),
    )
    (shorter / "optimizer.pt").write_text("who")
    (lacking / "rng_state.pth").unlink(missing_ok=True)
    (lacking / "scheduler.pt").unlink()
    (half_marked / "whole.json").write_text("{")
    (folder.path / ".config.yaml.123.partial").touch()
    assert folder.newest_checkpoint() == good
    assert folder.reopen() == good
    assert not any(path.exists() for path in (unmarked, shorter, lacking, half_marked))
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints"]


def test_a_checkpoint_that_is_written_anew_counts_until_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder, 10)
    folder.set_aside(10)
    half = checkpoint(folder, 10, whole=False)
    (half / "optimizer.pt").write_text("half")
    newest = folder.newest_checkpoint()  # killed here
    assert newest is not None
    assert (newest / "optimizer.pt").read_text() == "whole"
    assert folder.reopen() == folder.newest_checkpoint() == folder.checkpoint(10)
    assert (folder.checkpoint(10) / "optimizer.pt").read_text() == "whole"
    folder.set_aside(10)
    (checkpoint(folder, 10) / "added").touch()  # whole again: the one aside goes
    assert [path.name for path in folder.checkpoints.iterdir()] == ["checkpoint-10"]


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="nothing to resume"):
        RunFolder(tmp_path / "none").reopen()


def test_a_used_folder_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_free(overwrite=False)
    checkpoint(folder, 1)
    with pytest.raises(PacaError, match=r"an unfinished run\. Continue it with --resume .*config\.yaml --resume\)"):
        folder.check_free(overwrite=False)
    folder.summary.touch()
    with pytest.raises(PacaError, match=r"a finished run\. Give another output\.dir"):
        folder.check_free(overwrite=False)
    folder.check_free(overwrite=True)


def test_clearing_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.clear({})
    checkpoint(folder, 1)
    folder.adapter.mkdir()
    for file in (folder.config, folder.metrics, folder.summary, folder.report, folder.path / "notes.txt"):
        file.touch()
    folder.clear({})
    left = ["config.yaml", "inputs.json", "notes.txt"]  # the config may be the one that was given
    assert [path.name for path in sorted(folder.path.iterdir())] == left
    assert folder.inputs.read_text() == "{}"


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/a", "checkpoints/mine", "config.yaml"])
def test_what_no_run_has_written_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for overwrite in (False, True):
        with pytest.raises(PacaError, match=rf"no folder of a run, and holds {Path(name).parts[0]}, which a run would"):
            RunFolder(tmp_path).check_free(overwrite=overwrite)


@pytest.mark.parametrize("read", ["model", "model/model.safetensors", "", "metrics.jsonl"])
def test_an_earlier_run_that_the_new_one_reads_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.clear({})
    folder.model.mkdir()
    (folder.model / "model.safetensors").touch()
    folder.metrics.touch()
    folder.summary.touch()
    elsewhere = [("data.train", str(tmp_path / "answers.jsonl")), ("model.name", str(tmp_path / "model"))]
    folder.check_free(overwrite=True, used=elsewhere)
    for overwrite in (False, True):  # not "start over with --set output.overwrite=true", which would remove it
        with pytest.raises(
            PacaError, match=r"model\.name is .*/run.*, in the folder of an earlier run.*another output"
        ):
            folder.check_free(overwrite=overwrite, used=[*elsewhere, ("model.name", str(folder.path / read))])

    monkeypatch.chdir(tmp_path)
    with pytest.raises(PacaError, match="in the folder of an earlier run"):
        folder.check_free(overwrite=True, used=[("model.name", f"run/{read}")])


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PacaError, match=r"output\.dir"):
        RunFolder(tmp_path / "file" / "run").clear({})


@pytest.mark.slow(reason="starts the program anew")
def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with trained_elsewhere(folder.path, tmp_path) as process:
        message = rf"run is in use: process {process.pid} on .+ trains there\. Wait"
        with pytest.raises(PacaError, match=message), folder.in_use():
            pass
        folder.metrics.touch()
        with pytest.raises(PacaError, match=rf"is still going: process {process.pid} on .+ trains it\."):
            find_adapter(folder.path)
    with pytest.raises(PacaError, match=r"is not finished: .* --resume"):
        find_adapter(folder.path)
    with folder.in_use():  # the lock that a killed process left is nobody's
        assert str(os.getpid()) in folder.lock.read_text()
    assert not folder.lock.exists()


def test_who_trains_is_told_where_one_may_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    assert holder_of(folder.lock) is None
    assert not folder.path.exists()
    with trained_elsewhere(folder.path, tmp_path) as process:
        real = os.open

        def only_reading(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, flags, *rest, **more)

        folder.metrics.touch()
        monkeypatch.setattr(os, "open", only_reading)
        with pytest.raises(PacaError, match=rf"is still going: process {process.pid} on"):
            find_adapter(folder.path)
        monkeypatch.undo()


def test_a_folder_made_in_vain_goes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    with pytest.raises(PacaError, match="a wrong setting"), folder.in_use():
        raise PacaError("a wrong setting")
    assert not folder.path.exists()
    with folder.in_use():
        folder.config.touch()
    assert folder.config.exists()


def test_a_folder_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(PacaError, match=r"can't be made or written: not a directory.*another output.dir"):
        folder.check_writable()
    with pytest.raises(PacaError, match=r"can't be made or written: .*another output.dir"), folder.in_use():
        pass


def test_trying_to_write_leaves_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "deep" / "run").check_writable()
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_whole(file, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "half \ud800")
    assert file.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [file]

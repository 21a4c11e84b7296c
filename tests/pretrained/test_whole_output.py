"""Results take their place whole; what a killed process left beside it goes, and what it had replaced comes back."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paca.messages.disk import DiskError
from paca.messages.errors import PacaError
from paca.pretrained.claims import Claim
from paca.pretrained.whole_output import put_in_place, whole_output, write_whole
from paca.training.folder.run_folder import RunFolder


def write(output: Path, text: str) -> None:
    with whole_output(output) as partial:
        partial.mkdir()
        (partial / "model").write_text(text)


def left_behind(output: Path) -> tuple[Path, Path]:
    """As a process leaves it that is killed between the two renames."""
    partial, replaced = (output.with_name(f".{output.name}.123.{end}") for end in ("partial", "replaced"))
    partial.mkdir()
    (partial / ".lock").touch()
    os.replace(output, replaced)
    return partial, replaced


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_other_new_files_may_read_these(tmp_path: Path, mask: int) -> None:
    """safetensors makes files that only their owner may read, and a server has another account."""
    before = os.umask(mask)
    try:
        with whole_output(tmp_path / "folder") as partial:
            partial.mkdir()
            save_file({"weight": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "run").touch(mode=0o755)
        with whole_output(tmp_path / "file.safetensors") as partial:
            save_file({"weight": torch.zeros(2)}, partial)
        (unfinished := tmp_path / "unfinished").mkdir()
        save_file({"weight": torch.zeros(2)}, unfinished / "model.safetensors")
        put_in_place(unfinished, tmp_path / "adapter")
    finally:
        os.umask(before)
    for file in ("folder/model.safetensors", "file.safetensors", "adapter/model.safetensors"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "folder" / "run").stat().st_mode & 0o777 == 0o755 & ~mask


def test_processes_of_one_number_write_the_same_file_as_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two containers that share a disk, which count their processes alike: they wrote into one file, and the one
    that came second found it gone."""
    sync, file, others = os.fsync, tmp_path / "comparison.json", ["the other's"]

    def meanwhile(descriptor: int) -> None:
        sync(descriptor)
        if others:
            write_whole(file, others.pop())

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_whole(file, "this one's")
    assert file.read_text() == "this one's"
    with whole_output(file) as partial:
        write_whole(partial, "this one's")
        with whole_output(file) as other:
            write_whole(other, "the other's")
    assert file.read_text() == "this one's"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    full = OSError(errno.ENOSPC, "")
    with pytest.raises(DiskError, match="The disk is full"), whole_output(tmp_path / "out"):
        raise full
    assert (tmp_path / "out" / "model").read_text() == "first"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_what_a_killed_process_replaced_comes_back_and_its_rest_goes(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    left_behind(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(KeyError), whole_output(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out" / "model").read_text() == "first"
    write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "model").read_text() == "second"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    partial, _ = left_behind(tmp_path / "out")
    with Claim(partial / ".lock") as claim:
        claim.take()
        write(tmp_path / "out", "second")
        assert partial.is_dir()


def test_all_of_it_is_on_the_disk_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "first")
    done = disk_calls(monkeypatch)
    write(tmp_path / "out", "second")
    # The old one moves away, the new one takes its name, and the name is on the disk before the old one is deleted.
    assert done[: done.index("gone")] == ["model", "out", "renamed", "renamed", tmp_path.name]


def test_a_checkpoint_is_on_the_disk_with_its_name_and_its_mark_when_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoint(4).mkdir(parents=True)
    (folder.checkpoint(4) / "optimizer.pt").touch()
    done = disk_calls(monkeypatch)
    folder.mark_whole(4)
    assert done[:3] == ["optimizer.pt", "checkpoint-4", "checkpoints"]
    assert "whole.json" in done[3]
    assert done[4:6] == ["renamed", "checkpoint-4"]


def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, in their order: names of what is flushed to the disk, renamings and removals of folders."""
    done: list[str] = []
    replace, rmtree = os.replace, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}").split("/")[-1]))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (done.append("gone"), rmtree(path, **how)))
    return done


def test_what_came_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    for name in ("folder", "file"):
        output = tmp_path / name
        refused = pytest.raises(PacaError, match="was not there when this began")
        with refused, whole_output(output, overwrite=False) as new:
            for place, text in ((new, "new"), (output, "mine")):
                if name == "folder":
                    place.mkdir()
                (place / "model" if name == "folder" else place).write_text(text)
        assert (output / "model" if name == "folder" else output).read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]


def test_ctrl_c_between_the_renames_puts_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "first")
    replace = os.replace

    def stopped(source: Path, target: Path) -> None:
        replace(source, target)
        if target.suffix == ".replaced":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "model").read_text() == "first"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_two_processes_that_replace_one_folder_both_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one puts its result there after this one took the old result away, and before this one's is there."""
    write(tmp_path / "out", "first")
    replace, others = os.replace, ["other"]

    def raced(source: Path, target: Path) -> None:
        replace(source, target)
        if target.suffix == ".replaced" and others:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "model").write_text(others.pop())

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raced)
        write(tmp_path / "out", "second")
    assert others == []
    assert (tmp_path / "out" / "model").read_text() == "second"
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    link = os.link

    def raced(source: Path, target: Path) -> None:
        target.write_text("another's")
        if not links:
            raise OSError(errno.EPERM, "no hard links here")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raced)
        refused = pytest.raises(PacaError, match="was not there when this began")
        with refused, whole_output(tmp_path / "out.gguf", overwrite=False) as made:
            made.write_text("ours")
    assert (tmp_path / "out.gguf").read_text() == "another's"
    assert [*tmp_path.iterdir()] == [tmp_path / "out.gguf"]


def test_a_new_file_is_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    with whole_output(tmp_path / "out.gguf", overwrite=False) as made:
        made.write_text("ours")
    assert (tmp_path / "out.gguf").read_text() == "ours"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "first")
    write(tmp_path / "link", "second")
    assert (tmp_path / "real" / "model").read_text() == "second"
    assert (tmp_path / "link").is_symlink()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "link", tmp_path / "real"]

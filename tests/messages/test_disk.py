"""Writes that fail, as each library tells it: one message, with the file and how much room is missing."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from paca.messages.disk import DiskError, disk_error, writing

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def _nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**30, 2**30 - 1024, 1024))


def chained() -> RuntimeError:
    error = RuntimeError("basic_ios::clear: iostream error")
    error.__context__ = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    return error


@pytest.mark.usefixtures("_nearly_full")
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        OSError("300000 requested and 65504 written"),
        RuntimeError("basic_ios::clear: iostream error"),
        chained(),
    ],
    ids=["os", "safetensors", "tokenizers", "numpy", "torch, sometimes", "torch"],
)
def test_a_full_disk_says_which_file_and_how_much_is_missing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught, writing(tmp_path / "model.bin", 3072):
        raise error
    said = f"It takes about 3.00 KiB, and 1.00 KiB is free in {tmp_path}: 2.00 KiB is missing."
    assert str(caught.value) == f"The disk is full: {tmp_path / 'model.bin'} could not be written. {said}"


def test_a_cause_counts_and_the_file_that_it_names(tmp_path: Path) -> None:
    error = RuntimeError("while generating")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "inner"))
    told = disk_error(error, tmp_path / "outer")
    assert str(told) == f"{tmp_path / 'inner'} could not be opened or written: permission denied."


def test_a_folder_that_is_gone_is_told_from_a_file_that_was_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"gone/x could not be written: its folder is gone"), writing(tmp_path):
        (tmp_path / "gone" / "x").write_text("")
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "missing").read_text()


@pytest.mark.parametrize(
    "error", [ValueError("no space left on device"), RuntimeError("shape mismatch"), OSError("nothing of the kind")]
)
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), writing(tmp_path):
        raise error
    assert not isinstance(error, DiskError)


def test_of_a_copy_the_file_that_could_not_be_written_is_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/source", None, str(tmp_path / "copy"))
    told = disk_error(error, tmp_path)
    assert told is not None
    assert f"{tmp_path / 'copy'} could not be written" in str(told)
    assert "/elsewhere" not in str(told)


def test_of_a_file_that_nobody_named_no_folder_is_told() -> None:
    told = disk_error(OSError(errno.ENOSPC, "No space left on device"))
    assert str(told).startswith("The disk is full: standard output, or a file that the error does not name, could not")


@pytest.mark.parametrize("path", [None, Path("merged")])
def test_in_a_deleted_working_folder_that_is_told(
    path: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        os.getcwd()
    assert "The working folder is gone" in str(disk_error(caught.value, path))

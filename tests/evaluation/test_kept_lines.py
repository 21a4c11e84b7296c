"""Lines that are kept for the next run: cut short, damaged, or another process's."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from paca.evaluation.kept_lines import KeptAnswers, alone_in, append, lines_of
from paca.evaluation.sides import Watcher
from paca.messages.disk import DiskError
from paca.messages.errors import PacaError


def test_a_line_that_was_cut_at_any_byte_is_left_out_and_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    append(file, {"key": "a", "answer": "\u00e9\u2028\ufffd"})
    first = file.read_bytes()
    append(file, {"key": "b", "answer": "\u00e9\U0001f600"})
    whole = file.read_bytes()
    for length in range(len(first), len(whole)):
        file.write_bytes(whole[:length])
        assert [row["key"] for row in lines_of(file)] == ["a"]
        assert file.read_bytes() == first
    file.write_bytes(whole)
    assert [row["key"] for row in lines_of(file)] == ["a", "b"]


@pytest.mark.parametrize("content", [b'{"a":\n', b"[1]\n", b"3\n", b"\xff\n"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_bytes(content)
    with pytest.raises(PacaError, match=r"answers\.jsonl is damaged"):
        lines_of(file)


def test_rows_that_are_no_answers_are_asked_again(tmp_path: Path, watcher: Watcher) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"key": 3, "answer": 1}\n{"key": "a"}\n{}\n')
    assert KeptAnswers("base", watcher, file).begin("answers", ["x"]) == {}


def test_a_full_disk_names_the_file_of_answers(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))
    try:
        with pytest.raises(DiskError, match=r"answers\.jsonl could not be written"):
            append(tmp_path / "answers.jsonl", {"key": "a"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_something_else_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers").touch()
    with pytest.raises(DiskError, match="answers could not be opened or written: file exists"):
        append(tmp_path / "answers" / "answers.jsonl", {"key": "a"})
    (tmp_path / "answers.jsonl").mkdir()
    with pytest.raises(DiskError, match=r"answers\.jsonl could not be opened or written: is a directory"):
        append(tmp_path / "answers.jsonl", {"key": "a"})


def test_one_process_evaluates_into_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"):
        with pytest.raises(PacaError, match=f"process {os.getpid()} on .* evaluates into"), alone_in(tmp_path / "out"):
            pass
        with alone_in(tmp_path / "other"), alone_in(None):
            pass
    with alone_in(tmp_path / "out"):
        pass


@pytest.fixture
def watcher() -> Watcher:
    from evaluation.tally import Tally

    return Tally()


def test_taking_a_cut_line_away_never_writes_the_whole_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed there would lose them."""
    file = tmp_path / "answers.jsonl"
    file.write_text('{"key": "a"}\n{"key": "b"}\n{"key"')
    monkeypatch.setattr(Path, "write_bytes", lambda *given: pytest.fail("it is written anew"))
    monkeypatch.setattr(Path, "write_text", lambda *given: pytest.fail("it is written anew"))
    assert [row["key"] for row in lines_of(file)] == ["a", "b"]
    assert file.read_bytes() == b'{"key": "a"}\n{"key": "b"}\n'

"""What a row or a report says of where its numbers come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

import paca
from paca.training.folder import provenance
from paca.training.folder.provenance import git_state, row_provenance, versions


def test_a_repository_is_dirty_by_what_counts(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1")
    (tmp_path / "rows.csv").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert git_state(package) == git_state(package, only_inside=True) == clean
    (tmp_path / "rows.csv").write_text("2")  # outside of the package
    assert git_state(package) == clean | {"dirty": True}
    assert git_state(package, only_inside=True) == clean
    (package / "new.py").write_text("1")
    assert git_state(package, only_inside=True) == clean | {"dirty": True}


def test_code_is_all_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git_state", lambda folder, *, only_inside: {"of": (folder, only_inside)})
    assert provenance.code_state() == {"of": (Path(paca.__file__).parent, True)}


def test_rows_say_what_they_were_measured_with() -> None:
    found = row_provenance(torch.device("cpu"))
    assert json.loads(found["versions"]) == versions()
    assert versions()["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == str(torch.get_num_threads())
    assert "cores" in found["machine"]
    assert found["date"].endswith("+00:00")
    assert found["command"]

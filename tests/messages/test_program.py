"""The command that a message tells the user to type runs where the user is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paca.messages.program import program


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for place in ("project/.venv/bin", "elsewhere/bin"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "paca").write_text("#!/bin/sh\n")
        (tmp_path / place / "paca").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "project/.venv/bin/python"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path


def test_the_name_alone_where_the_shell_finds_this_installation(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(installed / "project/.venv/bin"))
    assert program() == "paca"


@pytest.mark.parametrize("path", ["", "elsewhere/bin"])
def test_the_path_where_the_shell_finds_none_or_another(
    installed: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PATH", str(installed / path))
    assert program() == ".venv/bin/paca"
    monkeypatch.chdir(installed)
    assert program() == "project/.venv/bin/paca"
    monkeypatch.chdir(installed / "elsewhere")
    assert program() == str(installed / "project/.venv/bin/paca")

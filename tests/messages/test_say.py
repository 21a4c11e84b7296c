"""The console that commands print their tables on."""

from __future__ import annotations

import io

import pytest

from paca.messages.say import console_for_tables


def test_a_table_in_a_log_file_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console_for_tables(file=io.StringIO()).width == 200
    monkeypatch.setenv("COLUMNS", "80")
    assert console_for_tables(file=io.StringIO()).width == 200


def test_a_terminal_keeps_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console_for_tables(file=io.StringIO(), force_terminal=True).width == 80

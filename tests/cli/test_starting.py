"""Python's collector while a command imports its libraries."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import pytest

from paca.cli.starting import loading_libraries


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each call of `gc.freeze`, which would keep the garbage of other tests."""
    calls: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(1))
    return calls


def test_garbage_is_not_looked_for_meanwhile_nor_later_in_what_was_imported(
    monkeypatch: pytest.MonkeyPatch, frozen: list[int]
) -> None:
    with loading_libraries():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "a_library", ModuleType("a_library"))
    assert gc.isenabled()
    assert len(frozen) == 1


def test_where_nothing_is_imported_nothing_is_kept(frozen: list[int]) -> None:
    with pytest.raises(ImportError), loading_libraries():
        raise ImportError
    assert gc.isenabled()
    assert not frozen


def test_a_collector_that_was_off_stays_off(frozen: list[int]) -> None:
    gc.disable()
    try:
        with loading_libraries():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

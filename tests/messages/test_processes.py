"""The number of processes that a launcher names."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import paca
from models import adapted_perceptron
from paca.messages.processes import check_launchers_variables, launched_processes


@pytest.mark.parametrize(("given", "want"), [(None, 1), ("", 1), (" ", 1), ("1", 1), ("16", 16)])
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, given: str | None, want: int) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if given is not None:
        monkeypatch.setenv("WORLD_SIZE", given)
    assert launched_processes() == want


def test_empty_variables_are_taken_out_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", ""), ("RANK", " "), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_launchers_variables()
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    assert [os.environ.get(name) for name in names] == [None, None, None, "0"]


@pytest.mark.parametrize("given", ["x", "0", "-1", "2.5", "²"])
def test_nonsense_is_an_error_that_names_the_variable(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(paca.PacaError, match=rf"WORLD_SIZE is '{re.escape(given)}', and has to be the number"):
        adapted_perceptron(random_seed=None)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_nonsense_in_the_others_is_an_error_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "-1")
    check_launchers_variables()
    monkeypatch.setenv(name, "x")
    with pytest.raises(paca.PacaError, match=f"{name} is 'x', and has to be "):
        check_launchers_variables()


def test_one_place_reads_it() -> None:
    reads = re.compile(r"environ[^\n]*WORLD_SIZE|getenv[^\n]*WORLD_SIZE")
    folder = Path(paca.__file__).parent
    assert [str(p) for p in folder.rglob("*.py") if reads.search(p.read_text(encoding="utf-8"))] == []

"""What `paca plan` says of its numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paca.cli import app
from paca.planning.memory_estimate import FRAMEWORK, PROGRAMS
from paca.planning.step_trace import ACTIVATIONS, LOSS, ORIGINAL_COLUMNS, TEMPORARIES
from tiny_checkpoint import WIDE, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=1, **WIDE))


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments, "--seq", "64"], terminal_width=200, catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.output.split())


@pytest.mark.slow(reason="simulates models over and over")
def test_times_of_a_busy_machine_are_told_with_its_load(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (4.24, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    busy = "The machine was busy in the last minute (load 4.2 on 2 cores): times are of what it left."
    assert busy in plan(base, "--device", "cpu")
    assert json.loads(plan(base, "--device", "cpu", "--json"))["rate"]["load"] == 4.24
    for nothing_measured in (["--device", "cpu", "--rate", "1"], ["--on", "h100"]):
        assert "busy" not in plan(base, *nothing_measured)


def test_what_malloc_keeps_is_said_of_a_cpu_alone(base: str) -> None:
    kept = "The process's peak may be up to about a tenth above the total, as malloc keeps what is freed."
    assert kept in plan(base, "--device", "cpu", "--rate", "1", "--quantization", "none")
    assert "malloc" not in plan(base, "--device", "cuda", "--rate", "1", "--memory", "8GiB", "--quantization", "none")


def test_without_a_given_budget_it_is_what_is_free_here(base: str) -> None:
    free = "budget (free on this machine) │"
    assert free in plan(base, "--device", "cpu", "--rate", "1")
    for given in (["--device", "cpu", "--rate", "1", "--memory", "8GiB", "--lean"], ["--on", "h100"]):
        text = plan(base, *given)
        assert "budget │" in text
        assert free not in text


def test_every_word_of_the_table_is_in_the_guide() -> None:
    """Those that are not of a method or a task."""
    page = (Path(__file__).parents[2] / "docs/guides/planning.md").read_text()
    for word in (ORIGINAL_COLUMNS, ACTIVATIONS.removesuffix(": "), LOSS, TEMPORARIES, FRAMEWORK, PROGRAMS, "budget"):
        assert f"- **{word}**: " in page

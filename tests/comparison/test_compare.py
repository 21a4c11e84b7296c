"""A comparison whose runs have ended, and what is reported of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from comparison.small_comparison import small_comparison, small_work
from paca.comparison.compare import compare
from paca.comparison.equal import CameOut
from paca.comparison.results import ComparisonResult


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    small_work(folder, "paca,lora,full").run()
    return folder


def reported(folder: Path, methods: str, measured: dict[str, dict[str, Any]], equal: tuple[str, ...]) -> Any:
    """Of a comparison that the fake trainer has made."""
    comparison = small_comparison(folder, methods, equal=equal)
    planned: Any = [
        SimpleNamespace(
            method=method, came_out=CameOut(method, measured.get(method.name, {})), plan=SimpleNamespace(steps=6)
        )
        for method in comparison.methods
    ]
    found: ComparisonResult = compare(comparison, planned, Console(quiet=True))
    return found


def test_a_method_that_does_not_fit_is_not_called_equal(trained: Path) -> None:
    """The resident sets are the same for all, as those of small models are: mostly libraries."""
    found = reported(trained, "paca,lora,full", {"paca": {"peak": 800}, "lora": {"peak": 790}}, ("memory",))
    paca, lora, full = found.methods
    assert (paca.equal_memory, lora.equal_memory, full.equal_memory) == (800, 790, None)
    assert found.verdict.startswith("At equal memory, no difference shown between paca and lora")
    assert "; not at equal memory, as full does not fit, no difference shown between paca and full" in found.verdict


def test_settings_that_follow_the_steps_are_told(trained: Path) -> None:
    measured = {"paca": {"step_ratio": 1.0}, "lora": {"step_ratio": 1.9, "scaled": {"warmup_steps": 53}}}
    notes = reported(trained, "paca,lora", measured, ("time",)).notes
    assert (
        "Equal time: a step of lora took 1.900 × that of paca, so it makes 6 steps where paca makes 6 (and has "
        "warmup_steps 53, in the same ratio)." in notes
    )


def test_a_run_that_finished_without_a_finite_score_is_told_by_what_happened(trained: Path, tmp_path: Path) -> None:
    """It had an empty message, and a file to delete that is not there."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    name = "paca-lr0.003-seed1"
    summary = tmp_path / "runs" / name / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "eval_loss_after": float("nan")}))
    found = reported(tmp_path, "paca,lora", {}, ())
    assert f"{name} failed: its loss on held-out data is not finite." in found.notes
    assert not any("failed.json" in note for note in found.notes)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["methods"][0]["failed"] == {name: "its loss on held-out data is not finite"}
    assert "1 of paca's 2 runs failed" in found.verdict

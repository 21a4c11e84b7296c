"""docs/notes/plan-on.md against the data that it is made of, and a few of its simulations against the code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from paca.planning import published_steps

ROOT = Path(__file__).parents[2]
KNOWN_OFF = {
    ("PEFT's table", "s per 5000 steps"),
    ("PEFT's comparison", "ms"),  # DoRA in June 2025
    ("paper", "time against LoRA"),
    ("paper", "longest sequence against LoRA with dropout"),
}
"""Where the page says why."""


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import plan_on

    yield plan_on
    sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_shows_the_errors_of_the_rows(script: Any) -> None:
    page = (ROOT / "docs/notes/plan-on.md").read_text(encoding="utf-8").splitlines()
    lines = script.table(script.read_simulated())
    start = page.index(lines[0])
    assert page[start : start + len(lines)] == lines


def test_what_is_off_is_named(script: Any) -> None:
    rows = [*zip(script.published(), script.read_simulated(), strict=True)]
    off = {(row.source, row.quantity) for row, number in rows if not script.within(row, number)}
    assert off <= KNOWN_OFF
    held_out = [row.use == "held out" for row, _ in rows]
    assert sum(held_out) > 4 * (len(rows) - sum(held_out))
    assert script.error(rows[0][0], 2 * rows[0][0].published) == 1


def test_the_errors_that_plan_prints_are_those_of_the_rows(script: Any) -> None:
    rows = [*zip(script.published(), script.read_simulated(), strict=True)]
    assert {row.device for row, _ in rows} == {*published_steps.ERRORS}
    for device, errors in published_steps.ERRORS.items():
        names = {"ms": "the time of a step", "GiB": "memory", "largest batch": "the largest batch"}
        for quantity, name in names.items():
            pairs = [pair for pair in rows if (pair[0].device, pair[0].quantity) == (device, quantity)]
            off = [round(100 * script.error(*pair)) for pair in pairs]
            assert errors.get(name) == ((min(off), max(off)) if off else None)


@pytest.mark.parametrize(("method", "batch", "quantity"), [("paca-random", 8, "ms"), ("lora-qv", 4, "GiB")])
def test_the_rows_are_what_the_simulation_gives(script: Any, method: str, batch: int, quantity: str) -> None:
    rows = zip(script.published(), script.read_simulated(), strict=True)
    row, number = next(
        pair for pair in rows if (pair[0].method, pair[0].batch, pair[0].quantity) == (method, batch, quantity)
    )
    assert script.simulated_of(row) == pytest.approx(number, rel=1e-3)


def test_the_page_is_what_the_script_writes(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import plan_on_page

    monkeypatch.setattr(plan_on_page, "PAGE", tmp_path / "page.md")
    plan_on_page.write()
    page = ROOT / "docs/notes/plan-on.md"
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")

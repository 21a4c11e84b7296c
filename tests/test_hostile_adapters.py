"""Adapters that were damaged, or made to do harm: an error, or a correct load, each time.

The long form is `make fuzz`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hostile_adapters.case import World
from paca.tuner import bounded_process, strange_expressions

CASES = 250


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("hostile"))


@pytest.mark.slow(reason="tries many cases")
def test_every_adapter_loads_right_or_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bounded_process, strange_expressions):
        monkeypatch.setattr(module, "SECONDS", 0.1)
    results = [world.run(1, number) for number in range(CASES)]
    wrong = {number: result for number, result in enumerate(results) if not result.right}
    assert wrong == {}
    outcomes = Counter(result.outcome for result in results)
    assert min(outcomes["loaded"], outcomes["refused"]) > CASES / 10
    assert {result.way for result in results if result.outcome == "loaded"} >= {"load", "chat", "merge", "import"}


def test_what_it_looks_for_is_seen(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(World, "_take", lambda self, *_: (elsewhere.write_text("x") and "loaded", ""))
    assert str(elsewhere) in world.run(1, 0).outcome
    monkeypatch.setattr(World, "_take", lambda self, *_: (self.secret.write_text("another key") and "loaded", ""))
    assert not world.run(1, 0).right
    with monkeypatch.context() as patch:
        patch.setattr(world, "before", {**world.before, "lm_head": int})
        patch.setattr(World, "_take", lambda self, *_: ("loaded", ""))
        assert "base model changed" in world.run(1, 0).outcome


def test_a_case_follows_from_its_seed(world: World) -> None:
    def made(seed: int, number: int) -> dict[str, bytes]:
        world.run(seed, number)
        files = (world.folder / "case" / "adapter").iterdir()
        return {file.name: file.read_bytes() for file in files if file.is_file() and not file.is_symlink()}

    assert made(3, 1) == made(3, 1)
    assert json.dumps(sorted(made(3, 1))) != "[]"
    assert made(3, 1) != made(3, 2)

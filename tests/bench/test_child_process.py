"""Memory of a method in a process of its own."""

from __future__ import annotations

import pytest
import torch

from bench.tiny_bench import settings
from paca.bench.child_process import ChildFailed, MeasuringChild, serve
from paca.bench.limits import Probe
from paca.bench.memory_in_use import ResidentSet
from paca.bench.settings import Point

MIB = 2**20


def test_the_peak_sees_a_tensor_that_is_gone_again() -> None:
    resident = ResidentSet()
    before = resident.now()
    resident.reset()
    tensor = torch.ones(200 * MIB // 4)
    del tensor
    assert resident.peak() - before > 190 * MIB
    if resident.source != "resident set":
        pytest.skip("this kernel does not reset its peak")
    assert resident.peak() - before < 260 * MIB
    resident.now()
    resident.reset()
    assert resident.peak() < before + 100 * MIB


def test_a_kernel_that_keeps_its_peak_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidentSet, "reset", lambda self: None)
    assert ResidentSet().source == "resident set, peak since the process began"


@pytest.mark.slow(reason="measures the memory of processes")
def test_a_child_measures_grows_with_the_batch_and_is_stopped_above_its_budget() -> None:
    """One process, since each costs its imports."""
    wanted = settings(dtype="float32", measure=("max-seq",), memory=150 * MIB)
    with MeasuringChild(wanted, "lora") as child:
        assert 0 < child.libraries <= child.weights
        small, large = child.run(Point(1, 64)), child.run(Point(1, 1024))
        assert small.fits
        assert large.fits
        assert large.peak - small.peak > 10 * MIB
        watched = child.run(Point(8, 2000))  # 500 MiB of activations: stopped on the way, so there is no peak
        assert watched == Probe(False, None, "over the budget")


def test_a_child_that_can_not_make_the_model_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child runs in this process."""

    def too_large(*given: object) -> None:
        torch.empty(2**45, dtype=torch.float64)

    kept: list[bool] = []
    monkeypatch.setattr("paca.bench.child_process.build_base_model", too_large)
    monkeypatch.setattr("paca.bench.child_process.keep_freed_memory", lambda: kept.append(True))
    answers: list[object] = []
    serve(settings(), "lora", [], answers.append)
    assert answers == ["while the model was made: out of memory"]
    assert kept == [True]  # as in training, so that the peaks are training's


def test_a_failure_in_the_child_arrives_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are played, so that no process is started for them."""
    monkeypatch.setattr(MeasuringChild, "_ask", lambda self, message: "out of memory")
    monkeypatch.setattr("paca.bench.child_process.sys.executable", "/bin/true")
    with pytest.raises(ChildFailed, match="out of memory"):
        MeasuringChild(settings(), "lora")

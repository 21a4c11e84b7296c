"""Memory of a method in a process of its own."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from bench.tiny_bench import settings
from paca.bench.child_process import MeasuringChild
from paca.bench.memory_in_use import ResidentSet
from paca.bench.settings import Point
from paca.messages.errors import PacaError

MIB = 2**20


@pytest.mark.parametrize("source", ["kernel", "sampler"])
def test_the_peak_sees_a_tensor_that_is_gone_again(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "sampler":
        monkeypatch.setattr("paca.bench.memory_in_use._kernel_peak_resets", lambda: False)
    resident = ResidentSet()
    if resident.by_kernel != (source == "kernel"):
        pytest.skip("this kernel does not reset its peak")
    before = resident.now()
    resident.reset()
    assert resident.peak() < before + 32 * MIB
    tensor = torch.ones(200 * MIB // 4)
    for _ in range(1000):  # the sampler may have to wait for its turn
        if resident.peak() - before > 190 * MIB:
            break
        time.sleep(0.01)
    del tensor
    assert 190 * MIB < resident.peak() - before < 260 * MIB
    resident.reset()
    assert resident.peak() < before + 100 * MIB


def test_a_sampler_ends_with_what_it_samples_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca.bench.memory_in_use._kernel_peak_resets", lambda: False)
    others = set(threading.enumerate())
    resident = ResidentSet()
    (sampler,) = set(threading.enumerate()) - others
    del resident
    sampler.join(60)
    assert not sampler.is_alive()


def test_a_child_measures_grows_with_the_batch_and_is_stopped_above_its_budget() -> None:
    """One process, since each costs its imports."""
    wanted = settings(dtype="float32", measure=("max-seq",), memory=150 * MIB)
    with MeasuringChild(wanted, "lora") as child:
        assert 0 < child.libraries <= child.weights
        small, large = child.run(Point(1, 64)), child.run(Point(1, 1024))
        assert small["fits"]
        assert large["fits"]
        assert large["peak"] - small["peak"] > 10 * MIB
        watched = child.run(Point(8, 2000))  # 500 MiB of activations: stopped on the way, so there is no peak
        assert watched == {"fits": False, "peak": None, "reason": "over the budget"}


def test_a_refusal_in_the_child_arrives_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are played, so that no process is started for them."""
    monkeypatch.setattr(MeasuringChild, "_ask", lambda self, message: {"refused": "no such width"})
    monkeypatch.setattr("paca.bench.child_process.sys.executable", "/bin/true")
    with pytest.raises(PacaError, match="no such width"):
        MeasuringChild(settings(), "lora")

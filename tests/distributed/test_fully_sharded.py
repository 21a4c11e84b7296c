"""FSDP2 with real processes: sharded models train as one process does, and give their pretrained weights back."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded_scenarios import SCENARIOS, run_all

from forked_process import FORKS


def left_by(world, folder):
    """What went wrong in each scenario, by process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(run_all, (world, store.port, str(folder)), world, start_method=FORKS.get_start_method())
    return {name: [(folder / f"{name}-{rank}.txt").read_text() for rank in range(world)] for name in SCENARIOS[world]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return left_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return left_by(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("scenario", SCENARIOS[2])
def test_two_processes(two, scenario):
    assert not any(two[scenario]), "\n".join(two[scenario])


@pytest.mark.parametrize("scenario", SCENARIOS[4])
def test_four_processes(four, scenario):
    assert not any(four[scenario]), "\n".join(four[scenario])

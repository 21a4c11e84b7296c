"""DistributedDataParallel with real processes: replicas stay equal, and equal to one process on the whole batch."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import paca
from forked_process import FORKS
from models import adapted_perceptron, base_state
from paca.layers import paca_layers

WORLD = 2


KINDS = ("plain", "rotation", "factors")


def train(model, run, batches, pick=None, kind="plain"):
    trained = [p for p in model.parameters() if p.requires_grad]
    factored = kind == "factors"
    optimizer = paca.FactoredAdamW(trained, lr=0.05, rank=1) if factored else torch.optim.AdamW(trained, lr=0.05)
    for number, x in enumerate(batches):
        if number and pick is not None:
            paca.rotate(run, optimizer, number, pick=pick)
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4 * WORLD, 7, generator=g, dtype=torch.float64) for _ in range(4)]


def worker(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for kind in KINDS:
        torch.manual_seed(rank)  # factors are drawn alike all the same
        model = adapted_perceptron(dtype=torch.float64)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        # What the second process picks must not matter: the first one's columns hold for both.
        pick = None if kind != "rotation" else "random" if rank == 0 else (lambda layer: torch.arange(layer.r))
        train(model, wrapped, [x[rank::WORLD] for x in batches()], pick, kind)
        with torch.no_grad():
            wrapped(batches()[0])
        resident = [layer.base_layer.weight.detach().clone() for layer in paca_layers(model)]
        torch.save({"model": model.state_dict(), "resident": resident}, f"{folder}/{rank}-{kind}.pt")
    del model, wrapped
    dist.barrier()  # neither leaves while the other one still uses its connections
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave that trained in each way."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(worker, args=(port, str(folder)), nprocs=WORLD, start_method=FORKS.get_start_method())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_agree_with_one_process(folder, kind):
    ranks = [torch.load(folder / f"{rank}-{kind}.pt") for rank in range(WORLD)]
    alone = adapted_perceptron(dtype=torch.float64)
    originals = base_state(alone)
    train(alone, alone, batches(), "random" if kind == "rotation" else None, kind)
    assert any("folded" in name for name in alone.state_dict()) == (kind == "rotation")
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0]["model"][name], ranks[1]["model"][name])
        torch.testing.assert_close(ranks[0]["model"][name], value, rtol=1e-9, atol=1e-11)
    for first, second in zip(ranks[0]["resident"], ranks[1]["resident"], strict=True):
        assert torch.equal(first, second)
    assert torch.equal(ranks[0]["model"]["base_model.model.lin1.base_layer.weight"], originals["lin1.weight"])

"""A column of the matrix: a model that FSDP2 shards. With several processes it is tested in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from paca.quantized.torchao import is_torchao
from support_matrix.case import Case, Explained, close, gradients, run, stock_output


def fully_sharded(case: Case) -> None:
    """As of `torch.compile`, but against the model that is whole. Quantized weights stay whole (`ignored_params`). \
Here in a group of one process; tests/distributed has two and four."""
    whole, model, x = case.model, case.adapted(), case.x
    if any(parameter.is_meta for parameter in model.parameters()):
        raise Explained("a model is either offloaded by accelerate or sharded over processes")
    with _group_of_one() as mesh:
        codes = {p for p in model.parameters() if not p.is_floating_point() or is_torchao(p)}
        fully_shard(model.get_base_model(), mesh=mesh, reshard_after_forward=True, ignored_params=codes)
        for _ in range(2):
            want, y = run(whole, x), run(model, x)
            close(y, want)
            for output in (want, y):
                output.square().mean().backward()
            for found, expected in zip(gradients(model), gradients(whole), strict=True):
                close(found.full_tensor(), expected)
            for layer in (*case.layers().values(), *case.layers(model).values()):
                with torch.no_grad():
                    layer.paca_delta["default"].mul_(2)
        with model.disable_adapter():
            close(run(model, x), stock_output(case))


@contextmanager
def _group_of_one() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()

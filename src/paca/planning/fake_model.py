"""Models whose tensors have shapes, dtypes and a device, but no values and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paca.lean import cache_blocks, gated_linear_unit, pointwise, rms_norm


def fake_mode() -> FakeTensorMode:
    """The mode under which fake models are made and run."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(model: nn.Module) -> None:
    """Turn all parameters and buffers of `model`, which is on the meta device, into fake ones on the CPU, in place.

    To be called under `fake_mode()`. Tied weights stay tied: one storage.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id is not given away

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = (tensor, empty)
        return made[id(tensor)][1]

    model._apply(fake)


@contextmanager
def one_block_per_loop() -> Iterator[None]:
    """Let the lean blocks' loops over rows end after the first round.

    All rounds allocate the same, and there are thousands of them in a long batch. Without values the rest of the
    result, which is allocated before the loop, needs no filling.
    """
    users: tuple[Any, ...] = (rms_norm, gated_linear_unit, pointwise)

    def first_only(rows: Tensor, elements_per_thread: int) -> Iterator[slice]:
        return islice(cache_blocks.row_blocks(rows, elements_per_thread), 1)

    originals = [module.row_blocks for module in users]
    for module in users:
        module.row_blocks = first_only
    try:
        yield
    finally:
        for module, original in zip(users, originals, strict=True):
            module.row_blocks = original

"""TRL's chunked loss, as a CPU computes it fastest and in least memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils

TILE = 512
"""Tokens of the vocabulary whose logits are computed at a time. The dozen passes over them stay in the cache."""


@contextmanager
def loss_for(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """On a CPU, let TRL's fused output head skip what has no label, and take narrow tiles.

    Where there is no Triton, TRL 1.16 projects prompts and padding onto the vocabulary too and drops the result: shapes
    stay the same from batch to batch, for accelerators that compile by shape. On a CPU that is lost work (measured:
    `docs/notes/speed.md`). On other devices nothing changes, nor with a TRL that has no such choice.

    Args:
        device: Where the loss is computed.
        compiled: By `torch.compile`, which would unroll the tiles, and compile anew for each number of labels: nothing
            changes.
    """
    if compiled:
        yield
        return
    with narrow_tiles(device), _instead(device, "_use_triton", lambda _: True):
        yield


@contextmanager
def narrow_tiles(device: torch.device) -> Iterator[None]:
    """On a CPU, the tiles alone. TRL's are 32,768 tokens wide, for kernels that read each of them once."""
    with _instead(device, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE):
        yield


@contextmanager
def every_position() -> Iterator[None]:
    """For tensors without values, which can't say where labels are: project all of them, also within `loss_for`."""
    with _instead(torch.device("cpu"), "_use_triton", lambda _: False):
        yield


def _instead(device: torch.device, name: str, value: Any) -> Any:
    known = device.type == "cpu" and hasattr(trl.trainer.utils, name)
    return patch.object(trl.trainer.utils, name, value) if known else nullcontext()

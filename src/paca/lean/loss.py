"""TRL's chunked loss, as a CPU computes it fastest and in least memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils
from trl.kernels import ChunkedLogProbFunction

from paca.lean.token_log_probs import TokenLogProbs

TILE = 512
"""Tokens of the vocabulary at a time, where TRL's own function is used. The passes over them stay in the cache."""

PARAMETERS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size"]
PARAMETERS += ["final_logit_softcapping", "logit_scale", "outputs"]
"""Of TRL's function, as `TokenLogProbs` knows them."""


@contextmanager
def loss_for(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """On a CPU, let TRL's fused output head skip what has no label, and compute the rest by `TokenLogProbs`.

    Where there is no Triton, TRL 1.16 projects prompts and padding onto the vocabulary too and drops the result: shapes
    stay the same from batch to batch, for accelerators that compile by shape. On a CPU that is lost work (measured:
    `docs/notes/speed.md`). On other devices nothing changes, nor with a TRL that has no such choice.

    Args:
        device: Where the loss is computed.
        compiled: By `torch.compile`, which would unroll the loops, and compile anew for each number of labels: nothing
            changes.
    """
    if compiled:
        yield
        return
    with in_blocks(device), _instead(device, "_use_triton", lambda _: True):
        yield


@contextmanager
def in_blocks(device: torch.device) -> Iterator[None]:
    """On a CPU, `TokenLogProbs` alone, and narrow tiles where it leaves the work to TRL's function."""
    known = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:] == PARAMETERS
    function = _instead(device, "_ChunkedLogProbFunction", TokenLogProbs) if known else nullcontext()
    with _instead(device, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE), function:
        yield


@contextmanager
def every_position() -> Iterator[None]:
    """For tensors without values, which can't say where labels are: project all of them, also within `loss_for`."""
    with _instead(torch.device("cpu"), "_use_triton", lambda _: False):
        yield


def _instead(device: torch.device, name: str, value: Any) -> Any:
    known = device.type == "cpu" and hasattr(trl.trainer.utils, name)
    return patch.object(trl.trainer.utils, name, value) if known else nullcontext()

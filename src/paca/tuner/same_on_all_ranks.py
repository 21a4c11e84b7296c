"""Choices that all processes of a run have to share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import distributed

from paca.messages.processes import launched_processes

Choice = TypeVar("Choice")


def same_on_all_ranks(choice: Choice) -> Choice:
    """The choice of the first process, in every process of the run; all have to call this at the same time."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return choice
    box = [choice]
    distributed.broadcast_object_list(box)
    return box[0]


def drawn_seed() -> int:
    """A seed from torch's random state for a config that has none (`random_seed: null`), the same in all processes."""
    connected = distributed.is_available() and distributed.is_initialized()
    if not connected and launched_processes() > 1:
        raise ValueError(
            "random_seed is null, so a seed has to be drawn, but the processes of this run are not connected yet and "
            "would draw different ones. Give random_seed a number, or connect them (accelerate.PartialState(), "
            "torch.distributed.init_process_group) before you make the adapter."
        )
    return same_on_all_ranks(int(torch.randint(2**31, (1,), device="cpu")))

"""A seed for a config that has none (`random_seed: null`)."""

from __future__ import annotations

import os

import torch
from torch import distributed

from paca.tuner.rotation.same_on_all_ranks import same_on_all_ranks


def drawn_seed() -> int:
    """A seed from torch's random state, the same in all processes of a run; all have to call this at the same time."""
    connected = distributed.is_available() and distributed.is_initialized()
    if not connected and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            "random_seed is null, so a seed has to be drawn, but the processes of this run are not connected yet and "
            "would draw different ones. Give random_seed a number, or connect them (accelerate.PartialState(), "
            "torch.distributed.init_process_group) before you make the adapter."
        )
    return int(same_on_all_ranks({"random_seed": torch.randint(2**31, (1,), device="cpu")})["random_seed"])

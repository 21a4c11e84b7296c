"""All that stands between accelerate and processes on a CPU: it shards for processes with accelerators only."""

from __future__ import annotations

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Let accelerate, in this process, take each process for one with an accelerator. It has gloo and a CPU."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))  # type: ignore[method-assign]

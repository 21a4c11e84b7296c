"""In which dtype a run multiplies matrices."""

from __future__ import annotations

import torch
from rich.console import Console

from paca.lean.float32_products import faster_in_float32, times_as_slow
from paca.messages.say import say
from paca.training.config.run_config import RunConfig


def dtype_of_products(config: RunConfig, dtype: str) -> torch.dtype:
    """What the layers of a run are given to multiply: autocast's dtype, or that of the weights.

    Args:
        config: Of the run, resolved.
        dtype: Of its weights in memory, such as `"bfloat16"`.
    """
    train = config.train
    return torch.bfloat16 if train.get("bf16") else torch.float16 if train.get("fp16") else getattr(torch, dtype)


def tell_of_products(config: RunConfig, dtype: str, console: Console) -> None:
    """Say so if this CPU makes the run's 16-bit products in float32, and why.

    Args:
        config: As for `dtype_of_products`.
        dtype: As for `dtype_of_products`.
        console: Where it is said.
    """
    on_cpu = config.train.get("use_cpu") or not torch.accelerator.is_available()
    kind = dtype_of_products(config, dtype)
    if on_cpu and faster_in_float32(torch.device("cpu"), kind):
        name = str(kind).removeprefix("torch.")
        slower = f"This CPU takes {times_as_slow(kind):.2g} × as long for products in {name} as in float32"
        say(console, f"{slower}: they are made in float32 here, a block at a time, and rounded.")

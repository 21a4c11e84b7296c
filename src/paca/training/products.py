"""In which dtype a run multiplies matrices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from rich.console import Console

from paca.lean.float32_products import faster_in_float32, float32_products, times_as_slow
from paca.messages.say import say
from paca.training.config.run_config import RunConfig
from paca.training.folder.same_run import PRODUCTS


def products_of_run(
    config: RunConfig, dtype: str, device: torch.device, record: dict[str, str]
) -> AbstractContextManager[None]:
    """How the products of a run are made: as its record says, so that a resumed run has the same bits; else as is
    fastest here, which is written into the record.

    Args:
        config: Of the run, resolved.
        dtype: Of its weights in memory, such as `"bfloat16"`.
        device: Where it is trained.
        record: What is recorded of it, from `inputs_of`.
    """
    own = _dtype_of_products(config, dtype)
    fastest = "float32" if faster_in_float32(device, own) else str(own).removeprefix("torch.")
    chosen = record.setdefault(PRODUCTS, fastest)
    return float32_products() if chosen == "float32" and own.itemsize == 2 else nullcontext()


def tell_of_products(config: RunConfig, dtype: str, console: Console) -> None:
    """Say so if this CPU makes the run's 16-bit products in float32, and why.

    Args:
        config: As for `products_of_run`.
        dtype: As for `products_of_run`.
        console: Where it is said.
    """
    on_cpu = config.train.get("use_cpu") or not torch.accelerator.is_available()
    kind = _dtype_of_products(config, dtype)
    if on_cpu and faster_in_float32(torch.device("cpu"), kind):
        name = str(kind).removeprefix("torch.")
        slower = f"This CPU takes {times_as_slow(kind):.2g} × as long for products in {name} as in float32"
        say(console, f"{slower}: they are made in float32 here, a block at a time, and rounded.")


def _dtype_of_products(config: RunConfig, dtype: str) -> torch.dtype:
    """What layers are given to multiply: in autocast's dtype, or in that of the weights."""
    train = config.train
    return torch.bfloat16 if train.get("bf16") else torch.float16 if train.get("fp16") else getattr(torch, dtype)

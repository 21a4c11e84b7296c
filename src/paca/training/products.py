"""In which dtype a run multiplies matrices."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext

import torch
from rich.console import Console

from paca.lean.float32_products import faster_in_float32, float32_products, times_as_slow
from paca.messages.say import say
from paca.training.config.run_config import RunConfig
from paca.training.folder.same_run import PRODUCTS


def decide_products(config: RunConfig, dtype: str, record: MutableMapping[str, str], *, resumed: bool = False) -> None:
    """Write into a run's record how its products are made, if it does not say yet: as is fastest here.

    A resumed run keeps to what it began with, so that it has the same bits; one without a word on it is from before
    there was a choice.

    Args:
        config: Of the run, resolved.
        dtype: Of its weights in memory, such as `"bfloat16"`.
        record: What is recorded of it, from `inputs_of`.
        resumed: Whether it has begun already.
    """
    own = _dtype_of_products(config, dtype)
    slow = not resumed and _is_on_cpu(config) and faster_in_float32(torch.device("cpu"), own)
    record.setdefault(PRODUCTS, "float32" if slow else _name(own))


def products_of_run(config: RunConfig, dtype: str, record: MutableMapping[str, str]) -> AbstractContextManager[None]:
    """The context in which a run multiplies as its record says; arguments as of `decide_products`."""
    is_converted = record[PRODUCTS] == "float32" and _dtype_of_products(config, dtype).itemsize == 2
    return float32_products() if is_converted else nullcontext()


def tell_of_products(
    config: RunConfig, dtype: str, console: Console, record: MutableMapping[str, str] | None = None
) -> None:
    """Say so if a run's 16-bit products are made in float32, and why; and if they could be and are not.

    Args:
        config: As for `decide_products`.
        dtype: As for `decide_products`.
        console: Where it is said.
        record: Of the run; None for one that is only planned.
    """
    if record is None:
        decide_products(config, dtype, record := {})
    own = _dtype_of_products(config, dtype)
    if not _is_on_cpu(config) or own.itemsize != 2:
        return
    in_float32, slow = record[PRODUCTS] == "float32", faster_in_float32(torch.device("cpu"), own)
    slower = (
        f"This CPU takes {times_as_slow(own):.2g} × as long for products in {_name(own)} as in float32" if slow else ""
    )
    if in_float32 and slow:
        say(console, f"{slower}: they are made in float32 here, a block at a time, and rounded.")
    elif in_float32:
        say(console, f"The run began with products of {_name(own)} made in float32, and keeps to them.")
    elif slow:
        say(console, f"{slower}, but the run began with its own, and keeps to them. A new run makes them in float32.")


def _is_on_cpu(config: RunConfig) -> bool:
    return bool(config.train.get("use_cpu")) or not torch.accelerator.is_available()


def _dtype_of_products(config: RunConfig, dtype: str) -> torch.dtype:
    """What layers are given to multiply: in autocast's dtype, or in that of the weights."""
    train = config.train
    return torch.bfloat16 if train.get("bf16") else torch.float16 if train.get("fp16") else getattr(torch, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

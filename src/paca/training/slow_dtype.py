"""Whether this CPU multiplies the run's 16-bit weights slower than it would float32's."""

from __future__ import annotations

import time

import torch
from rich.console import Console

from paca.messages.say import say
from paca.messages.units import format_bytes
from paca.training.config.run_config import RunConfig

_WORTH_IT = 1.5  # times as slow; below it other work of a step, which gains by 16 bits, may take back what is won


def tell_of_slow_dtype(config: RunConfig, dtype: str, parameters: int, console: Console) -> None:
    """Say so if products take longer in the weights' dtype, by how much here, and what to do. Only CPUs are asked.

    Many have no unit for bfloat16 and convert each value. With AVX2 alone a training step took 26 times as long
    (docs/notes/speed.md), and nothing shows but that the run is slow.

    Args:
        config: Of the run.
        dtype: Of the weights in memory, such as `"bfloat16"`; of products, where they are quantized.
        parameters: How many there are.
        console: Where it is said.
    """
    kind = getattr(torch, dtype)
    if kind.itemsize != 2 or (torch.accelerator.is_available() and not config.train.get("use_cpu")):
        return
    ratio = product_time(kind) / product_time(torch.float32)
    if ratio >= _WORTH_IT:
        more = "" if config.model.quantization else f"; its weights take {format_bytes(2 * parameters)} more"
        told = f"This CPU takes {ratio:.2g} × as long for products in {dtype} as in float32"
        say(console, f"{told}: with model.dtype=float32 the run should be faster{more}.", style="yellow")


def product_time(dtype: torch.dtype) -> float:
    """Seconds of a product of a small layer's size, on all threads: the shortest of some within a tenth of a second."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 or (len(taken) < 20 and time.perf_counter() - begin < 0.1):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        taken.append(time.perf_counter() - start)
    return min(taken)

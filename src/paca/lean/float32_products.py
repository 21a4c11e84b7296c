"""Matrix products of 16-bit values, made in float32 on CPUs that are faster so."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

_WORTH_IT = 1.25
"""Times as slow as float32's, above which converting is faster: it takes back less than a tenth."""
_EDGE = 1024
"""Rows and columns that are converted at most at a time: 4 MiB of float32 for each factor and for their product."""
_OFTEN = 32
"""Multiplications for each value that is converted, below which it would take longer than it saves."""
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@lru_cache
def times_as_slow(dtype: torch.dtype) -> float:
    """How many times as long as float32's products those of `dtype` take this CPU, on all threads (within 0.3 s)."""
    kinds = (dtype, torch.float32)
    factors = {kind: (torch.ones(256, 512, dtype=kind), torch.ones(512, 512, dtype=kind)) for kind in kinds}
    taken: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    begin = time.perf_counter()
    while len(taken[dtype]) < 3 or (len(taken[dtype]) < 20 and time.perf_counter() - begin < 0.2):
        for kind, (x, weight) in factors.items():
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            taken[kind].append(time.perf_counter() - start)
    return min(taken[dtype]) / min(taken[torch.float32])


def faster_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` is a CPU that is slower at products of `dtype` than at float32's."""
    return device.type == "cpu" and dtype in _SIXTEEN_BITS and times_as_slow(dtype) >= _WORTH_IT


def fastest_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """`float32_products()` where `faster_in_float32`; elsewhere nothing changes."""
    return float32_products() if faster_in_float32(device, dtype) else nullcontext()


@contextmanager
def float32_products() -> Iterator[None]:
    """Make the CPU's products of 16-bit matrices in float32, and round each sum once, as units for 16 bits do.

    `paca train` does so where a CPU is slower at 16 bits than at float32, most of all with AVX2 alone. Weights,
    activations and gradients stay in 16 bits; blocks of them are converted as they are multiplied. It holds for the
    whole process and every layer: in eager code, in autograd's products, and in compiled code where that calls
    torch's. Convolutions and fused attention are as before.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings(action="ignore"):  # that an operator has another kernel now
            for name, product in _PRODUCTS.items():
                for overload in (name, f"{name}.out"):
                    kernel = torch.library.get_kernel(f"aten::{overload}", "CPU").call_boxed
                    library.impl(overload, _instead(kernel, product), "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


def _instead(kernel: Callable[..., Any], product: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def multiply(keys: Any, *values: torch.Tensor, **options: Any) -> torch.Tensor:
        if not _gains(*values[-2:]) or values[0].dtype != values[-1].dtype:
            return kernel(keys, *values, **options)
        out = options.pop("out", None)
        result = product(*values, **options)
        return result if out is None else out.copy_(result)

    return multiply


def _gains(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two factors are of 16 bits and large enough; not where they don't fit, which torch's own kernel says."""
    if a.dtype not in _SIXTEEN_BITS or a.dtype != b.dtype or (*a.shape[:-2], a.shape[-1]) != b.shape[:-1]:
        return False
    rows, columns = a.shape[-2], b.shape[-1]
    return a.numel() > 0 and rows * columns >= _OFTEN * (rows + columns)


def _addmm(added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    result = a.new_empty(a.shape[0], b.shape[1])
    added = added.expand_as(result)
    for rows, columns in itertools.product(_blocks(a.shape[0]), _blocks(b.shape[1])):
        total = added[rows, columns].float()
        for number, part in enumerate(_blocks(a.shape[1])):
            factors = a[rows, part].float(), b[part, columns].float()
            total.addmm_(*factors, beta=1 if number else beta, alpha=alpha)
        result[rows, columns] = total
    return result


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _addmm(a.new_empty(1, 1), a, b, beta=0)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result = a.new_empty(*a.shape[:2], b.shape[2])
    for some in _blocks(a.shape[0], max(1, _EDGE**2 // max(values[:1].numel() for values in (a, b, result)))):
        result[some] = torch.bmm(a[some].float(), b[some].float())
    return result


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {"mm": _mm, "addmm": _addmm, "bmm": _bmm}


def _blocks(size: int, edge: int = _EDGE) -> list[slice]:
    count = max(1, -(-size // edge))
    edges = [size * place // count for place in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]

"""Matrix products of 16-bit values, made in float32 on CPUs that are faster so."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_WORTH_IT = 1.25
"""Times as slow as float32's, above which converting is faster: it takes back less than a tenth."""
_VERY_SLOW = 4.0
"""Times as slow, above which small products gain too: a CPU without any instructions for the dtype."""
_EDGE = 1024
"""Rows and columns that are converted at most at a time: 4 MiB of float32 for each factor and for their product."""
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
TIMING = threading.RLock()  # a time is measured once, as the number of threads is changed for it, which is everybody's
_times: dict[torch.dtype, float] = {}


def times_as_slow(dtype: torch.dtype) -> float:
    """How many times as long as float32's products those of `dtype` take a thread of this CPU (within 0.3 s, once)."""
    if dtype not in _times:
        with TIMING, torch.autocast("cpu", enabled=False):
            if dtype not in _times:
                _times[dtype] = _measured(dtype)
    return _times[dtype]


def _measured(dtype: torch.dtype) -> float:
    """In the thread's own time, so that other work on the machine changes little."""
    kinds = (dtype, torch.float32)
    factors = {kind: torch.ones(2, 256, 256, dtype=kind, device="cpu") for kind in kinds}
    taken: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    fine = time.get_clock_info("thread_time").resolution < 1e-6  # not on Windows
    clock = time.thread_time if fine else time.perf_counter
    threads, begin = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        while len(taken[dtype]) < 3 or (len(taken[dtype]) < 30 and time.perf_counter() - begin < 0.2):
            for kind, (x, weight) in factors.items():
                start = clock()
                torch.nn.functional.linear(x, weight)
                taken[kind].append(clock() - start)
    finally:
        torch.set_num_threads(threads)
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
    activations and gradients stay in 16 bits; blocks of them are converted as they are multiplied, where there are
    enough multiplications to pay for that. It holds for the whole process, all its threads and every layer: in eager
    code, in autograd's products, and in compiled code where that calls torch's. Convolutions, fused attention, and
    products in place or that are added to a batch (`addmm_`, `baddbmm`) are as before.

    It does not ask whether this CPU is slower at 16 bits: where it is not, products take longer so.
    """
    with TIMING:
        _install()
        _wanted[0] += 1
    try:
        yield
    finally:
        with TIMING:
            _wanted[0] -= 1


_wanted = [0]  # by how many contexts
_installed: list[torch.library.Library] = []  # for good: another thread may be within a product when a context ends


def _install() -> None:
    if _installed:
        return
    for dtype in _SIXTEEN_BITS:  # before: it multiplies too
        times_as_slow(dtype)
    _installed.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings(action="ignore"):  # that an operator has another kernel now
        for name in _PRODUCTS:
            for overload in (name, f"{name}.out"):
                kernel = torch.library.get_kernel(f"aten::{overload}", "CPU").call_boxed
                _installed[0].impl(overload, _instead(name, kernel), "CPU", with_keyset=True)


def _instead(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def multiply(keys: Any, *values: Tensor, out: Tensor | None = None, **options: Any) -> Tensor:
        if not _wanted[0] or not _gains(name, values[-2], values[-1], out) or values[0].dtype != values[-1].dtype:
            return kernel(keys, *values, **options, **({} if out is None else {"out": out}))
        result = _PRODUCTS[name](*values, **options)
        return result if out is None else out.copy_(result)

    return multiply


def _gains(name: str, a: Tensor, b: Tensor, out: Tensor | None) -> bool:
    """Whether two factors are of 16 bits and multiply each value often. Not where they don't fit each other or `out`,
    which torch's own kernel has words, or ways, for."""
    if b.dtype not in _SIXTEEN_BITS or a.dtype != b.dtype or {a.dim(), b.dim()} != {3 if name == "bmm" else 2}:
        return False
    shape = (*a.shape[:-1], b.shape[-1])
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2] or 0 in (*shape, a.shape[-1]):
        return False
    if out is not None and (out.shape != shape or out.dtype != a.dtype):
        return False
    often = 1 / (1 / shape[-2] + 1 / shape[-1] + 1 / a.shape[-1])  # multiplications for each value of all three
    return often >= (6 if times_as_slow(a.dtype) >= _VERY_SLOW else 128)


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    result = a.new_empty(a.shape[0], b.shape[1])
    added = added.expand_as(result)
    for rows, columns in itertools.product(_blocks(a.shape[0]), _blocks(b.shape[1])):
        total = added[rows, columns].float()
        for number, part in enumerate(_blocks(a.shape[1])):
            factors = a[rows, part].float(), b[part, columns].float()
            total.addmm_(*factors, beta=1 if number else beta, alpha=alpha)
        result[rows, columns] = total
    return result


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _addmm(a.new_empty(1, 1), a, b, beta=0)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    result = a.new_empty(*a.shape[:2], b.shape[2])
    largest = max(values[0].numel() for values in (a, b, result))
    if largest > _EDGE**2:
        for one, other, product in zip(a, b, result, strict=True):
            product.copy_(_mm(one, other))
        return result
    for some in _blocks(len(a), _EDGE**2 // largest):
        product = a.new_empty(result[some].shape, dtype=torch.float32)
        result[some] = torch.bmm(a[some].float(), b[some].float(), out=product)  # `out`: autocast leaves it alone
    return result


_PRODUCTS: dict[str, Callable[..., Tensor]] = {"mm": _mm, "addmm": _addmm, "bmm": _bmm}


def _blocks(size: int, edge: int = _EDGE) -> list[slice]:
    count = max(1, -(-size // edge))
    edges = [size * place // count for place in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]

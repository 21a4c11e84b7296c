"""Adding to a weight's columns with one rounding, to the weight's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW_BITS = {torch.float16: 13, torch.bfloat16: 16}  # what a normal float32 loses when it becomes one of these
_SMALLEST_NORMAL_HALF = 2.0**-14


def add_once(base: Tensor, change: Tensor, scale: float) -> Tensor:
    """``base + scale * change``, rounded once to ``base``'s dtype (to nearest, ties to even).

    Args:
        base: any shape, any float dtype.
        change: same shape and device.
        scale: for a power of two and float32 changes, the product is exact and the sum is taken in float32, which is
            faster than float64 on CPU; results below 2**-99 may then be off by the last subnormal bit.
    """
    if (
        change.dtype == torch.float32
        and type(base) is Tensor  # a fake tensor has no values to look for ties in
        and base.device.type == "cpu"  # elsewhere launches cost more than float64, and looking for ties synchronizes
        and (base.dtype == torch.float32 or base.dtype in _LOW_BITS)
        and math.frexp(scale)[0] == 0.5
    ):
        total = torch.add(base, change, alpha=scale)  # float32
        return total if base.dtype == torch.float32 else _round_sum(total, base, change, scale)
    wide = torch.float32 if base.device.type == "mps" else torch.float64  # MPS has no float64
    return round_once(torch.add(base.to(wide), change.to(wide), alpha=scale), base.dtype)


def _round_sum(total: Tensor, base: Tensor, change: Tensor, scale: float) -> Tensor:
    """Round ``total``, which is ``base + scale * change`` in float32, to ``base``'s 16-bit dtype as if it were exact.

    A second rounding errs only where the first one made a tie, which is rare; there the sum is taken again.
    """
    dtype = base.dtype
    rounded = total.to(dtype)
    dropped = total.view(torch.int32) << (32 - _LOW_BITS[dtype])  # the bits that go; a tie is a one and zeros
    tie = torch.iinfo(torch.int32).min
    doubtful = (dropped == tie) if total.numel() and bool(dropped.min() == tie) else None
    if dtype == torch.float16:  # its subnormal numbers are coarser, so ties look different
        subnormal = total.abs() < _SMALLEST_NORMAL_HALF
        doubtful = subnormal if doubtful is None else doubtful | subnormal
    if doubtful is not None:
        where = doubtful.nonzero(as_tuple=True)
        exact = torch.add(base[where].to(torch.float64), change[where].to(torch.float64), alpha=scale)
        rounded[where] = round_once(exact, dtype)
    return rounded


def round_once(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest, ties to even.

    torch converts float64 to a 16-bit type by way of float32, which rounds twice: a value just above a tie becomes the
    tie, and is then rounded down. Rounding to odd on the way (an inexact float32 gets an odd last bit) prevents it.

    Args:
        total: any shape; float64, or float32 on devices without it.
        dtype: of the result.
    """
    if total.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return total.to(dtype)
    single = total.to(torch.float32)
    back = single.to(torch.float64)
    inexact = back != total
    too_large = back.abs() > total.abs()
    bits = single.view(torch.int32)
    odd = (bits - too_large.to(torch.int32)) | inexact.to(torch.int32)  # truncated, then made odd
    finite = torch.isfinite(single)
    return torch.where(finite, odd, bits).view(torch.float32).to(dtype)

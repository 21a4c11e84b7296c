"""Rounding a float64 sum to a weight's dtype, once."""

from __future__ import annotations

import torch
from torch import Tensor


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

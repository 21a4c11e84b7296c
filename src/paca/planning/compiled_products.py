"""What a CPU's matrix library compiles for the products of a training step, and keeps."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from paca.planning.operators import GROUPED, Operator

PROGRAM_BYTES = 768 * 2**10
"""Of one program. Measured with torch 2.13 on a CPU with AMX: 0.58 to 1.1 MiB for widths of 64 to 1536, 0.7 on average;
held to AVX-512 with bfloat16 instructions 0.54 to 0.60. Programs for float32 take 0.08 at most and are not counted."""
_KEPT = 1024
"""Programs that each of these caches keeps, unless its variable says otherwise."""
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, and of torch's layer above it. Measured after products of 1,500 shapes (torch 2.13, AVX-512): 704 MiB by
default, 478 with the first one at 64, 514 with the second, 59 with both. A program goes once both have dropped it."""


def program_bytes(operators: Iterable[Operator], lengths: int) -> int:
    """Bytes of oneDNN's programs on this CPU: one for each shape of a bfloat16 product.

    A mixture of experts fills the caches: in each step its experts get other numbers of rows. Measured (torch 2.13,
    AVX-512, 16 experts): after 120 grouped products with 665 such numbers 359 MiB, and 16 in float32.

    Args:
        operators: Of a step.
        lengths: How many different lengths its batches have: each has programs of its own.
    """
    if not torch.cpu._is_avx512_bf16_supported():  # such CPUs have no products in bfloat16 to compile
        return 0
    compiled, most = [operator for operator in operators if _compiled(operator)], max(map(_capacity, _CACHES))
    shapes = {(operator.phase, operator.product) for operator in compiled}
    grouped = any(operator.name == GROUPED for operator in compiled)
    return (most if grouped else min(len(shapes) * lengths, most)) * PROGRAM_BYTES


def _capacity(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else _KEPT


def _compiled(operator: Operator) -> bool:
    return operator.product is not None and operator.dtype == torch.bfloat16

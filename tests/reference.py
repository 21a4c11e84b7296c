"""The naive reference: the adapted layer written out in float64, one dense weight, autograd does the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# (adapter's delta (out, r), indices (r,), scale)
Adapter = tuple[Tensor, Tensor, float]


def dense_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """`W0 + sum_a s_a * scatter(delta_a, indices_a)` in float64, for a weight `(out, in)`."""
    total = weight.detach().double().clone()
    for delta, indices, scale in adapters:
        for column, position in enumerate(indices.tolist()):
            total[:, position] += scale * delta.detach().double()[:, column]
    return total


def rounded_sum(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The invariant: `W0 + sum_a s_a * scatter(delta_a, indices_a)` in float32 (float64 for float64), rounded once.

    For a weight `(out, in)` or a stack `(experts, out, in)`.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.detach().to(wide)
    for delta, indices, scale in adapters:
        columns = torch.add(total.index_select(-1, indices), delta.detach().to(wide), alpha=scale)
        total = total.index_copy(-1, indices, columns)
    return total.to(weight.dtype)


def nearest(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The value of `dtype` nearest to each float64 value, ties to even: found by comparing neighbours."""
    if dtype not in (torch.float16, torch.bfloat16):
        return total.to(dtype)
    bits = total.to(dtype).view(torch.int16)
    around = torch.stack([bits - 1, bits, bits + 1])
    distance = (around.view(dtype).double() - total).abs()
    best = distance == distance.min(0).values
    even = best & (around % 2 == 0)
    choice = torch.where(even.any(0), even.int().argmax(0), best.int().argmax(0))
    return around.gather(0, choice[None])[0].view(dtype)


def reference_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], grad_output: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient of x, and gradients of the deltas, all in float64, from a weight whose columns are read as is.

    `weight` already holds the adapters' columns (so that its rounding is not the matter here).
    """
    x64 = x.detach().double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    y = x64 @ w64.T
    if bias is not None:
        y = y + bias.detach().double()
    y.backward(grad_output.double())
    assert x64.grad is not None
    assert w64.grad is not None
    return y.detach(), x64.grad, [scale * w64.grad[:, indices] for _, indices, scale in adapters]


def tolerance(dtype: torch.dtype, terms: int) -> dict[str, float]:
    """Error bound of a dot product of `terms` terms in `dtype` whose accumulation is at least float32."""
    unit = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return {"rtol": 2 * unit, "atol": (2 * unit + wide * terms) * 4 * terms**0.5}

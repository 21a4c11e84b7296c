"""RMSNorm that keeps its input in the input's own dtype and one float32 `rstd` per row.

The stock modules of transformers compute in float32 and keep the float32 copy: twice the bytes of a half-precision
input. Forward results on CPU are bitwise those of the stock modules. The gradient is computed in float32 and rounded
once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from paca.functional.first_order import first_order
from paca.lean.cache_blocks import RowLayout, row_blocks
from paca.lean.liger import liger_rms_norm

RMSNormStyle = Literal["llama", "gemma"]

# 512 KiB of float32: half of what measured best where memory is warm, twice of what did where each page is fresh.
_ELEMENTS_PER_THREAD = 2**17


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: RMSNormStyle) -> Tensor:
    """RMSNorm of `x (..., features)` over its last dimension, as transformers defines it for Llama or for Gemma.

    `"llama"` rounds the normalized rows to x's dtype, then multiplies by `weight (features,)`: the result has the
    promoted dtype. `"gemma"` multiplies by `1 + weight` in float32, then rounds to x's dtype. `eps` is added to the
    mean square.
    """
    if liger_rms_norm is not None and x.is_cuda:
        # in_place=False: Liger would write the input's gradient over the output's, which a residual branch may share.
        return liger_rms_norm(x, weight, eps, 1.0 if style == "gemma" else 0.0, style, False)
    return _RMSNorm.apply(x, weight, eps, style)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: RMSNormStyle) -> Tensor:
        layout = RowLayout.of(x)
        rows = layout.rows(x)
        dtype = torch.promote_types(x.dtype, weight.dtype) if style == "llama" else x.dtype
        y = layout.empty(dtype, x.device)
        y_rows = layout.rows(y)
        rstd = rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
        for block in row_blocks(rows, _ELEMENTS_PER_THREAD):
            _normalize(rows[block], weight, eps, style, y_rows[block], rstd[block])
        ctx.save_for_backward(x, weight, rstd)
        ctx.style = style
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        layout = RowLayout.of(x)
        rows, grad_rows = layout.rows(x), layout.rows(grad_output)
        factor = _factor(weight, ctx.style)
        grad_x = layout.empty(x.dtype, x.device) if ctx.needs_input_grad[0] else None
        grad_x_rows = None if grad_x is None else layout.rows(grad_x)
        grad_weight = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for block in row_blocks(rows, _ELEMENTS_PER_THREAD):
            if grad_x_rows is not None:
                grad_x_rows[block] = _input_gradient(grad_rows[block], rows[block], rstd[block], factor)
            if grad_weight is not None:
                grad_weight += _weight_gradient(grad_rows[block], rows[block], rstd[block])
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _normalize(x: Tensor, weight: Tensor, eps: float, style: RMSNormStyle, y: Tensor, rstd: Tensor) -> None:
    """Write `y` and `rstd` with the stock modules' own operators in their order, so that results agree bitwise."""
    x32 = x.to(torch.float32)
    rstd.copy_(x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_())
    normalized = x32.mul_(rstd) if x32 is not x else x32 * rstd
    if style == "llama":
        torch.mul(normalized.to(x.dtype), weight, out=y)
    else:
        y.copy_(normalized.mul_(_factor(weight, style)))


def _factor(weight: Tensor, style: RMSNormStyle) -> Tensor:
    """What the normalized row is multiplied by, in float32."""
    return weight.to(torch.float32) if style == "llama" else 1.0 + weight.to(torch.float32)


def _input_gradient(grad_output: Tensor, x: Tensor, rstd: Tensor, factor: Tensor) -> Tensor:
    """`rstd g - x rstd^3 mean(g x)` in float32, where `g = grad_output * factor`."""
    grad = grad_output.to(torch.float32)
    grad = grad.mul_(factor) if grad is not grad_output else grad * factor
    x32 = x.to(torch.float32)
    projection = (grad * x32).mean(-1, keepdim=True).mul_(rstd.pow(3))
    return grad.mul_(rstd).addcmul_(x32, projection, value=-1)


def _weight_gradient(grad_output: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """`sum over rows of grad_output * normalized`, float32 `(features,)`."""
    return (x.to(torch.float32) * rstd).mul_(grad_output).sum(0)

"""Which attention kernel a device would run, for a forward pass on fake tensors.

`scaled_dot_product_attention` picks a kernel by looking at the device. On fake tensors it always picks the plain
formula, which keeps the whole matrix of attention weights; the fused kernels keep one number per query instead. Here
the choice of the real device is made, and the kernel is called by its own name, so that autograd saves what it would
save there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
_stock = F.scaled_dot_product_attention


def attention_of(device: str) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` for fake tensors, as `device` (`"cpu"` or `"cuda"`) would run it.

    On a CPU torch itself is asked for its choice. For CUDA the rules are written down here, those of torch 2.13: flash
    attention for half precision without a mask; memory-efficient attention with a mask or in float32, unless key and
    value have fewer heads than the query; else the plain formula.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        operands, how = (query, key, value), (dropout_p, is_causal)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if device == "cpu":
            if _cpu_takes_the_formula(operands, attn_mask, *how, **options):
                return _stock(*operands, attn_mask, *how, **options)
            flash = aten._scaled_dot_product_flash_attention_for_cpu
            return flash(*operands, *how, attn_mask=_additive(attn_mask, query.dtype), scale=scale)[0]
        half = query.dtype in (torch.float16, torch.bfloat16)
        same_width = query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        if query.dim() == 4 and half and same_width and attn_mask is None:
            return aten._scaled_dot_product_flash_attention(*operands, *how, False, scale=scale)[0]
        if query.dim() == 4 and query.dtype != torch.float64 and query.shape[1] == key.shape[1]:
            mask = _additive(attn_mask, query.dtype)
            if mask is not None:
                mask = mask.expand(*query.shape[:-1], key.shape[-2])
            return aten._scaled_dot_product_efficient_attention(*operands, mask, True, *how, scale=scale)[0]
        return _stock(*operands, attn_mask, *how, **options)

    return attention


def _cpu_takes_the_formula(
    operands: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, dropout: float, causal: bool, **options: Any
) -> bool:
    """Whether torch chooses the plain formula, asked for the same shapes made short."""
    query, key, _ = operands
    short = {length: min(length, 8 + rank) for rank, length in enumerate({query.shape[-2], key.shape[-2]})}

    def stand_in(tensor: Tensor, *sequence_dims: int) -> Tensor:
        shape = list(tensor.shape)
        shape[0] = min(shape[0], 2)
        for dim in sequence_dims:
            shape[dim] = short.get(shape[dim], shape[dim])
        dtype = query.dtype if tensor.dtype == torch.bool else tensor.dtype
        return torch.empty(shape, dtype=dtype, device="cpu", requires_grad=tensor.requires_grad)

    with _disable_current_modes():
        choose: Any = torch._fused_sdp_choice  # its stub is wrong
        small_mask = None if mask is None else stand_in(mask, -2, -1)
        return choose(*(stand_in(tensor, -2) for tensor in operands), small_mask, dropout, causal, **options) == 0


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The kernels take a mask to be added; torch makes one out of a boolean mask anew at every call, and keeps it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, mask.new_zeros((), dtype=dtype), mask.new_full((), float("-inf"), dtype=dtype))

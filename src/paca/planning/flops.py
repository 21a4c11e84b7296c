"""Floating-point operations of the matrix products and of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
)
_ATTENTION_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
)


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call of an ATen operator, a multiplication and an addition counted as two.

    Matrix products, convolutions and fused attention are counted, causal attention as the half that has to be computed;
    everything else is 0.
    """
    packet = operator._overloadpacket
    if packet in _ATTENTION:
        operations = sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    elif packet in _ATTENTION_BACKWARD:
        operations = sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    else:
        formula = flop_registry.get(packet)
        if formula is None and packet.__name__.endswith("_"):
            formula = flop_registry.get(getattr(aten, packet.__name__[:-1], None))  # addmm_ counts as addmm
        return 0 if formula is None else formula(*args, **kwargs, out_val=result)
    return operations // 2 if _is_causal(operator, args, kwargs) else operations


def _is_causal(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "is_causal":
            given = args[position] if position < len(args) else kwargs.get("is_causal", argument.default_value)
            return bool(given)
    return False

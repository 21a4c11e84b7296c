"""Quantized layers on tensors without values: what they hold, and what their weights are unpacked to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paca.quantized import QuantizedWeight, quantization_of


def quantization_name(model: nn.Module) -> str | None:
    """How the first quantized layer of `model` is quantized, such as `"nf4"`; None if there is none."""
    found = (quantization_of(module) for module in model.modules())
    return next((kind.name(module) for kind, module in zip(found, model.modules(), strict=True) if kind), None)


def unpacked_numel(model: nn.Module) -> dict[int, int]:
    """By the id of each quantized weight, how many weights its codes stand for."""
    layers: list[tuple[QuantizedWeight, Any]] = [
        (kind, module) for module in model.modules() if (kind := quantization_of(module)) is not None
    ]
    return {id(kind.packed(module)): torch.Size(kind.shape(module)).numel() for kind, module in layers}


def states(model: nn.Module) -> Iterator[Tensor]:
    """What the quantized layers of `model` hold besides parameters: scales, and tables of codes."""
    for module in model.modules():
        if (state := _state(module)) is not None:
            yield from (
                tensor for part in _parts(state) for tensor in vars(part).values() if isinstance(tensor, Tensor)
            )


def fake_states(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    """Turn what `states` gives into fake tensors, in place, after the parameters have become fake."""
    for module in model.modules():
        state, weight = _state(module), getattr(module, "weight", None)
        if state is None:
            continue
        for part in _parts(state):
            for name, tensor in vars(part).items():
                if isinstance(tensor, Tensor):
                    setattr(part, name, weight.data if name == "CB" else fake(tensor))  # type: ignore[union-attr]
        if hasattr(state, "CB"):
            weight.CB = weight.SCB = None  # type: ignore[union-attr]  # as after a layer's first forward pass
        else:
            weight.quant_state = state  # type: ignore[union-attr]


def _state(module: nn.Module) -> Any:
    """bitsandbytes' record of a layer's 4-bit or int8 weight."""
    if quantization_of(module) is None:
        return None
    four_bit = getattr(module, "quant_state", None)
    return getattr(module, "state", None) if four_bit is None else four_bit


def _parts(state: Any) -> list[Any]:
    nested = getattr(state, "state2", None)  # double quantization
    return [state] if nested is None else [state, nested]


def dequantized_product(
    x: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' `gemm_4bit` of a layer without columns, in the steps in which it is computed."""
    operators: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None and absmax_offset is not None:
        absmax = operators.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = absmax + absmax_offset
    weight = operators.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype)
    return functional.linear(x, weight, bias)


def dequantized_bytes(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes that one call of an ATen or bitsandbytes operator reads and writes in order to unpack a weight, else 0."""
    name = operator._schema.name
    if name in ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"):
        codes, scales = args[0], args[1]
        return codes.nbytes + scales.nbytes + result.nbytes
    if name == "aten::_to_copy" and args[0].dtype == torch.int8 and result.is_floating_point():
        return args[0].nbytes + 3 * result.nbytes  # written, and multiplied by the scales in place
    return 0

"""Quantized layers on tensors without values: what they hold, and what their weights are unpacked to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import integrations
from torch import Tensor, nn
from torch.nn import functional

from paca.quantized import QuantizedWeight, quantization_of


def quantization_name(model: nn.Module) -> str | None:
    """How the first quantized layer of `model` is quantized, such as `"nf4"`; None if there is none."""
    return next((kind.name(module) for kind, module in _quantized(model)), None)


def unpacked_numel(model: nn.Module) -> dict[int, int]:
    """By the id of each quantized weight, how many weights its codes stand for."""
    return {id(kind.packed(module)): torch.Size(kind.shape(module)).numel() for kind, module in _quantized(model)}


def states(model: nn.Module) -> Iterator[Tensor]:
    """What the quantized layers of `model` hold besides parameters: scales, and tables of codes."""
    for _, module in _quantized(model):
        for part in _parts(_state(module)):
            yield from (tensor for tensor in vars(part).values() if isinstance(tensor, Tensor))


def fake_states(model: nn.Module, fake: Callable[[Tensor], Tensor]) -> None:
    """Turn what `states` gives into fake tensors, in place, after the parameters have become fake."""
    for _, module in _quantized(model):
        state, weight = _state(module), module.weight
        for part in _parts(state):
            for name, tensor in vars(part).items():
                if isinstance(tensor, Tensor):
                    setattr(part, name, weight.data if name == "CB" else fake(tensor))
        if hasattr(state, "CB"):
            weight.CB = weight.SCB = None  # as after a layer's first forward pass
        elif state is not None:
            weight.quant_state = state


def _quantized(model: nn.Module) -> Iterator[tuple[QuantizedWeight, Any]]:
    return ((kind, module) for module in model.modules() if (kind := quantization_of(module)) is not None)


def _state(module: Any) -> Any:
    """bitsandbytes' record of a layer's 4-bit or int8 weight."""
    four_bit = getattr(module, "quant_state", None)
    return getattr(module, "state", None) if four_bit is None else four_bit


def _parts(state: Any) -> list[Any]:
    """The record, and with double quantization the one in it."""
    return [part for part in (state, getattr(state, "state2", None)) if part is not None]


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


@contextmanager
def unpacked_by_peft(model: nn.Module) -> Iterator[None]:
    """In here PEFT's methods can look at the model's quantized weights without values: it knows real ones by their
    class."""
    if quantization_name(model) is None:
        yield
        return
    ours = {"dequantize_bnb_weight": _unpacked_weight, "dequantize_module_weight": _unpacked_layer}
    theirs = {name: getattr(integrations, name) for name in ours}
    _put(ours, theirs)
    try:
        yield
    finally:
        _put(theirs, ours)  # also in modules that were imported meanwhile


def _put(these: dict[str, Any], there: dict[str, Any]) -> None:
    for place in [module for name, module in [*sys.modules.items()] if name.startswith("peft.")]:
        for name, function in these.items():
            if vars(place).get(name) is there[name]:
                setattr(place, name, function)


def _unpacked_weight(weight: Any, state: Any = None) -> Tensor:
    import bitsandbytes

    four_bit = getattr(weight, "quant_state", None)
    if four_bit is None:
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, state.SCB)
    return bitsandbytes.functional.dequantize_4bit(weight.data, four_bit)


def _unpacked_layer(module: Any) -> Tensor:
    kind = quantization_of(module)
    return module.weight if kind is None else kind.dequantize(module)


def dequantized_bytes(operator: Any, args: tuple[Any, ...], result: Any) -> int:
    """Bytes that one call of an ATen or bitsandbytes operator reads and writes in order to unpack a weight, else 0."""
    name = operator._schema.name
    if name in ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"):
        codes, scales = args[0], args[1]
        return codes.nbytes + scales.nbytes + result.nbytes
    if name == "aten::_to_copy" and args[0].dtype == torch.int8 and result.is_floating_point():
        return args[0].nbytes + 3 * result.nbytes  # written, and multiplied by the scales in place
    return 0

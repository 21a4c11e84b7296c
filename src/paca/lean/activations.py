"""The pointwise activations of the known blocks: forward as the stock modules compute it, derivative from the input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations as stock

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One activation function."""

    forward: Callable[[Tensor], Tensor]
    """Bitwise the stock module's result."""
    backward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """`(grad_output, input, out) -> grad_input`, in one operator, with float32 arithmetic inside for half precision;
    `out` may be `grad_output`."""
    keeps: str
    """What autograd keeps for the stock module: `"input"` is already the least, `"more"` is not."""


def _derivative(operator: Any, *constants: float, **options: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """One of torch's `*_backward` operators, in its functional form or, given `out`, in the other."""

    def backward(grad_output: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            return operator(grad_output, x, *constants, **options)
        return operator.grad_input(grad_output, x, *constants, **options, grad_input=out)

    return backward


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _derivative(aten.silu_backward), "input"),
    "gelu": Activation(F.gelu, _derivative(aten.gelu_backward), "input"),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"), _derivative(aten.gelu_backward, approximate="tanh"), "input"
    ),
    # Several operators and kept tensors in the stock module; the same function as gelu_tanh up to rounding.
    "gelu_new": Activation(_gelu_new, _derivative(aten.gelu_backward, approximate="tanh"), "more"),
    "relu": Activation(F.relu, _derivative(aten.threshold_backward, 0), "more"),
}


def activation_name(module: nn.Module) -> str | None:
    """The key in `ACTIVATIONS` of a stock activation module, by its exact class; None if it is not known."""
    kind = type(module)
    if kind in (stock.SiLUActivation, nn.SiLU):
        return "silu"
    if kind is nn.ReLU:
        return "relu"
    if kind is stock.NewGELUActivation:
        return "gelu_new"
    if kind is stock.GELUTanh:
        # Its second form, "gelu_python_tanh", is gelu_new's formula.
        return "gelu_tanh" if isinstance(module.act, functools.partial) else "gelu_new"
    if kind is stock.GELUActivation and module.act is F.gelu:
        return "gelu"
    return None

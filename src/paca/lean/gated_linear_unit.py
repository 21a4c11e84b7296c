"""`activation(gate) * up` that keeps gate and up only; the stock modules keep activation(gate) as well.

Forward and gradients are bitwise the stock modules' wherever the activation is a single operator of torch (SiLU, GELU)
and one thread computes. With several, torch's own last bit in float32 depends on where it splits the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paca.functional.first_order import first_order
from paca.lean.activations import ACTIVATIONS
from paca.lean.cache_blocks import row_blocks
from paca.lean.liger import liger_gated

# 1 MiB of bf16: smaller blocks lose to the operators' fixed cost, larger ones to fresh pages.
_ELEMENTS_PER_THREAD = 2**19


def gated_linear_unit(gate: Tensor, up: Tensor, activation: str, save_only: bool = False) -> Tensor:
    """`activation(gate) * up`, `(..., features)` each, in the promoted dtype of `gate` and `up`.

    Args:
        gate: Of the activation.
        up: Of the same shape.
        activation: A key of `ACTIVATIONS`.
        save_only: A recomputation needs what the forward pass saved, not its result: leave the result uninitialized.
    """
    if torch.compiler.is_compiling():
        return ACTIVATIONS[activation].forward(gate) * up
    if activation in liger_gated and gate.is_cuda and gate.dtype == up.dtype:
        return _LigerGatedLinearUnit.apply(gate.contiguous(), up.contiguous(), activation)
    return _GatedLinearUnit.apply(activation, save_only, gate, up)


def fused_gated_linear_unit(gate_up: Tensor, activation: str, save_only: bool = False) -> Tensor:
    """`activation(gate) * up` of the two halves of `gate_up`, `(..., 2 features)`, as Phi-3 lays them out.

    One gradient tensor for both halves: slicing outside would make autograd pad and add two. Arguments as
    `gated_linear_unit`.
    """
    if torch.compiler.is_compiling() or (liger_gated and gate_up.is_cuda):
        gate, up = gate_up.chunk(2, dim=-1)
        return gated_linear_unit(gate, up, activation, save_only)
    return _GatedLinearUnit.apply(activation, save_only, gate_up)


class _GatedLinearUnit(torch.autograd.Function):
    """Of `(gate, up)`, or of one tensor with both as halves, whose gradient then is one tensor too."""

    @staticmethod
    def forward(ctx: Any, activation: str, save_only: bool, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.activation = activation
        return _product(*_gate_and_up(operands), activation, save_only)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        operands = ctx.saved_tensors
        grads = [operand.new_empty(operand.shape) for operand in operands]
        _write_gradients(grad_output, *_gate_and_up(operands), ctx.activation, *_gate_and_up(grads))
        return None, None, *grads


def _gate_and_up(operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = operands if len(operands) == 2 else operands[0].chunk(2, dim=-1)
    return gate, up


def _product(gate: Tensor, up: Tensor, activation: str, save_only: bool) -> Tensor:
    forward = ACTIVATIONS[activation].forward
    product = gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))
    if not save_only:
        gates, ups, products = _walkable(gate, up, product)
        for block in row_blocks(gates, _ELEMENTS_PER_THREAD):
            torch.mul(forward(gates[block]), ups[block], out=products[block])
    return product


def _write_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, grad_gate: Tensor, grad_up: Tensor
) -> None:
    """Write the gradients into `grad_gate` and `grad_up`, whose leading dimensions must be contiguous."""
    functions = ACTIVATIONS[activation]
    grad, gate, up, grad_gate, grad_up = _walkable(grad, gate, up, grad_gate, grad_up)
    for block in row_blocks(gate, _ELEMENTS_PER_THREAD):
        torch.mul(functions.forward(gate[block]), grad[block], out=grad_up[block])
        grad_activated = torch.mul(grad[block], up[block], out=grad_gate[block])
        functions.backward(grad_activated, gate[block], grad_activated)


def _walkable(*tensors: Tensor) -> list[Tensor]:
    """The tensors flat, if all are contiguous, else as `(rows, features)`; views wherever the memory allows.

    Flat, because torch's vectorized exponential and the scalar one at the end of a loop differ in the last bit: blocks
    of whole vectors give what one loop over everything gives.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(-1) for tensor in tensors]
    return [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]


class _LigerGatedLinearUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return liger_gated[activation][0](gate, up)[2]

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = liger_gated[ctx.activation][1](gate, up, grad_output.contiguous())
        # Liger writes the gradients over gate and up behind autograd's back: make a second backward raise, not lie.
        torch.autograd.graph.increment_version((gate, up))
        return grad_gate.view(gate.shape), grad_up.view(up.shape), None

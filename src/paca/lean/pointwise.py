"""Activations of MLPs without a gate that keep their input (GELU by formula) or one bit per element (ReLU)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paca.functional.first_order import first_order
from paca.lean.activations import ACTIVATIONS
from paca.lean.cache_blocks import row_blocks

_ELEMENTS_PER_THREAD = 2**16
# Multiplying a word of eight bytes, each 0 or 1, by this gathers byte k as bit k of the product's highest byte.
_GATHER_BITS = 0x0102040810204080
# Multiplying a byte by this copies it into all eight bytes of a word; of byte k the mask then leaves bit k.
_COPY_BYTE = 0x0101010101010101
_BIT_K_OF_BYTE_K = 0x8040201008040201 - 2**64


def lean_activation(x: Tensor, activation: str, save_only: bool = False) -> Tensor:
    """`activation(x)`, keeping one bit per element for `"relu"` and `x` for the others of `ACTIVATIONS`.

    With `save_only` the result is uninitialized, for a recomputation that only needs what is saved.
    """
    if torch.compiler.is_compiling():
        return ACTIVATIONS[activation].forward(x)
    if activation == "relu":
        return _ReLU.apply(x)
    return _FromInput.apply(x, activation, save_only)


class _FromInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, save_only: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        forward = ACTIVATIONS[activation].forward
        y = x.new_empty(x.shape)
        if save_only:
            return y
        flat, out = x.reshape(-1), y.view(-1)
        for block in row_blocks(flat, _ELEMENTS_PER_THREAD):
            out[block] = forward(flat[block])
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        return ACTIVATIONS[ctx.activation].backward(grad_output, x, None), None, None


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(pack_bits(y <= 0))  # so that NaN passes its gradient on, as in the stock module
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (blocked,) = ctx.saved_tensors
        return grad_output.masked_fill(unpack_bits(blocked, grad_output.shape), 0)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor of any shape as uint8 `(ceil(numel / 8),)`, eight elements a byte."""
    flat = mask.reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % 8))
    # bool -> int64 reinterprets eight bytes at once: three passes over numel / 8 words instead of eight over numel.
    words = flat.view(torch.int64)
    return words.mul(_GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_bits`: a boolean tensor of `shape`."""
    words = bits.to(torch.int64).mul_(_COPY_BYTE).bitwise_and_(_BIT_K_OF_BYTE_K)
    return words.view(torch.uint8)[: shape.numel()].view(shape).ne(0)

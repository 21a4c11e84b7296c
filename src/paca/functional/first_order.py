"""Backward passes that can't be differentiated: a second derivative raises, by whichever way it is asked for.

PyTorch's `once_differentiable` raises only where the whole graph is run. With inputs that are named
(`torch.autograd.grad(loss, parameters)`, `backward(inputs=...)`) autograd runs what leads to them alone. Its error is
on no such way, and the share of the second derivative would be missing without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward pass of a `torch.autograd.Function`, which depends on what it saved and on `ctx.added`."""

    @wraps(backward)
    def once(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grad_outputs)
        reached = [*grad_outputs, *ctx.saved_tensors, *getattr(ctx, "added", ())]
        with torch.no_grad():
            found = backward(ctx, *grad_outputs)
        every = found if isinstance(found, tuple) else (found,)
        there = [n for n, gradient in enumerate(every) if gradient is not None]
        raising = _Raise.apply(len(there), *(every[n] for n in there), *(t for t in reached if t is not None))
        gradients = list(every)
        for n, gradient in zip(there, raising, strict=True):
            gradients[n] = gradient
        return tuple(gradients) if isinstance(found, tuple) else gradients[0]

    return once


class _Raise(torch.autograd.Function):
    """The first `count` tensors, as functions of all."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "Second derivatives (create_graph=True, as for gradient penalties and MAML) were asked of a layer with "
            "PaCA columns or of a lean block, which have first ones alone. Leave them out, or train with another "
            "method, and without lean blocks."
        )

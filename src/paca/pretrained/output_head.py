"""The output head of a language model on a CPU, where `generate` gives it a slice of the hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def multiply_once(model: nn.Module) -> None:
    """Let the head of `model` take the last positions of several sequences in one product, as it takes whole ones.

    torch (2.13) folds sequences into one product where they lie in memory one after the other, or where the weight is
    trained. Those that `generate` cuts out of its prompts do not: with a frozen weight it makes a batch of products,
    and on a CPU in 16 bits a copy of the weight for each. Numbers are in `docs/notes/speed.md`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_one_after_the_other)


def _one_after_the_other(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if torch.is_grad_enabled() or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].device.type != "cpu":
        return None
    hidden = args[0]
    if hidden.dim() != 3 or hidden.stride(0) == hidden.shape[1] * hidden.shape[2]:
        return None
    return (torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device).copy_(hidden),)

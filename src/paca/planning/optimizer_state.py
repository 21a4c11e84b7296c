"""What an optimizer keeps per trainable parameter, and what its step allocates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paca.columns.factored import layer_of_delta
from paca.messages.errors import PacaError

_TWO_MOMENTS = ("adamw_torch", "adamw_torch_fused")
_EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")
_STATELESS = ("sgd",)

_FACTORED = "factored_adamw_"

KNOWN_OPTIMIZERS = (*_TWO_MOMENTS, *_EIGHT_BIT, *_STATELESS)


def state_bytes(optimizer: str, trainable: Sequence[Tensor]) -> int:
    """Bytes of optimizer state for the `trainable` parameters; PacaError for none of `KNOWN_OPTIMIZERS`."""
    if optimizer in _TWO_MOMENTS:
        return sum(2 * p.numel() * p.element_size() for p in trainable)
    if optimizer in _EIGHT_BIT:
        # bitsandbytes keeps two float32 moments below 4096 elements, and above it two bytes and a scale per 256.
        return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + p.numel() // 32 for p in trainable)
    if optimizer in _STATELESS:
        return 0
    if optimizer.startswith(_FACTORED):
        return sum(2 * p.nbytes if layer_of_delta(p) is None else 3 * _factors(optimizer, p) for p in trainable)
    raise PacaError(f"The memory of the optimizer {optimizer!r} is not known; known are {', '.join(KNOWN_OPTIMIZERS)}.")


def optimizer_of(train: Mapping[str, Any]) -> str:
    """What the functions here call the optimizer of a run, by the section `train` of its config."""
    rank = train.get("factor_rank")
    return str(train["optim"]) if rank is None else f"{_FACTORED}{rank}"


def known(optimizer: str) -> bool:
    """Whether the functions here know it."""
    return optimizer in KNOWN_OPTIMIZERS or optimizer.startswith(_FACTORED)


def _factors(optimizer: str, delta: Tensor) -> int:
    """Bytes of both factors of a delta; of what is none, those of the parameter."""
    layer = layer_of_delta(delta)
    if layer is None:
        return delta.nbytes
    rank, wide = int(optimizer.removeprefix(_FACTORED)), torch.promote_types(delta.dtype, torch.float32)
    shape = delta.flatten(layer.delta_column_dim % delta.dim()).shape
    return wide.itemsize * rank * sum(delta.numel() // size for size in shape[-2:])


def step_temporaries(optimizer: str, device: str, trainable: Sequence[Tensor]) -> int:
    """Bytes that the optimizer's step allocates and frees again."""
    sizes = [p.numel() * p.element_size() for p in trainable]
    if optimizer.startswith(_FACTORED):  # gradients of all factors and their denominators; deltas one at a time
        return 2 * sum(_factors(optimizer, p) for p in trainable) + 2 * max(sizes, default=0)
    if optimizer == "adamw_torch":
        # On CUDA its for-each form makes the denominators of all parameters at once, elsewhere of one at a time.
        return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)
    return 0


def stepped(optimizer: str, trainable: Sequence[Tensor]) -> Callable[[], None]:
    """What follows a backward pass: gradients are clipped, and an optimizer steps with those of `trainable`.

    AdamW's fused form stands for the 8-bit kinds.
    """
    parameters = [p for p in trainable if p.grad is not None]
    if optimizer in _STATELESS:
        made: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=1e-3, foreach=True)
    elif optimizer == "adamw_torch":
        made = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    else:
        made = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        made.step()

    return step

"""What an optimizer keeps per trainable parameter, and what its step allocates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from paca.columns import factored
from paca.columns.factored import FactoredAdamW, layer_of_delta
from paca.functional.factored import FactorGradient
from paca.functional.product import FACTORED, factors_of
from paca.messages.errors import PacaError
from paca.messages.processes import launched_processes

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
    if optimizer.startswith(_FACTORED):  # denominators, and gradients that follow from a delta's; deltas one at a time
        made = sum((2 if factors_of(p) is None else 1) * _factors(optimizer, p) for p in trainable)
        return made + 2 * max(sizes, default=0)
    if optimizer == "adamw_torch":
        # On CUDA its for-each form makes the denominators of all parameters at once, elsewhere of one at a time.
        return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)
    return 0


def factoring(optimizer: str, trainable: Sequence[Tensor]) -> FactoredAdamW | None:
    """What steps factors of `trainable`, which have no values; backward passes make their gradients while it is there.
    None for other optimizers."""
    if not optimizer.startswith(_FACTORED):
        return None
    made = FactoredAdamW(trainable, lr=1e-3, rank=int(optimizer.removeprefix(_FACTORED)))
    with patch.object(factored, "is_trained", lambda delta: False):
        made.begin()
    if launched_processes() > 1:  # which make the deltas' own
        for parameter in trainable:
            FACTORED.pop(id(parameter), None)
    return made


def gradient_of(parameter: Tensor) -> Tensor:
    """A gradient without values, as backward passes leave it."""
    factors = factors_of(parameter)
    if factors is None:
        return torch.empty_like(parameter)
    like = parameter.shape, parameter.stride(), parameter.dtype
    return FactorGradient(
        like, factors._replace(parameter=None), torch.empty_like(factors.a), torch.empty_like(factors.b)
    )


def stepped(optimizer: str, trainable: Sequence[Tensor], of_factors: FactoredAdamW | None = None) -> Callable[[], None]:
    """What follows a backward pass: gradients are clipped, and an optimizer steps with those of `trainable`.

    AdamW's fused form stands for the 8-bit kinds. `of_factors` is what `factoring` gave.
    """
    parameters = [p for p in trainable if p.grad is not None]
    if of_factors is not None:
        made: torch.optim.Optimizer = of_factors
    elif optimizer in _STATELESS:
        made = torch.optim.SGD(parameters, lr=1e-3, foreach=True)
    elif optimizer == "adamw_torch":
        made = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)
    else:
        made = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=None if of_factors is not None else True)
        made.step()

    return step

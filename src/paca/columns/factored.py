"""AdamW on two factors of each delta: columns that learn as LoRA does, and cost what columns do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from paca.columns.stepping import layer_of_delta

_FACTORS = ("a", "b")


class FactoredAdamW(torch.optim.Optimizer):
    """AdamW that keeps each of PaCA's deltas as `scale * B A`, and steps `A` and `B` as it would LoRA's.

    A delta `(out_features, r)` is computed from `B (out_features, rank)`, zeros at first, and `A (rank, r)`, drawn as
    PEFT draws LoRA's (the same on every process); of convolutions `r` times the kernel's size, of experts one pair for
    each. Their gradients follow from the delta's: a product each a step, not one a token. So the model runs as with any
    other optimizer, and what a layer learns is of rank `rank` in its `r` columns. Moments are of the factors' sizes.
    Factors are float32 (float64 for float64 deltas).

    Parameters that are no deltas of PaCA, such as those of `modules_to_save`, are stepped by AdamW. A delta that is
    not zero at the first step (training goes on) is kept as the start that the factors add to.

    Source: the factors are those of LoRA (Hu et al., 2021, arXiv 2106.09685); why, is in docs/notes/quality.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int = 64,
        scale: float = 2.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Args:
            params: As for any optimizer of torch.
            lr: The rate of both factors. LoRA's rates fit, not PaCA's.
            rank: Of the factors.
            scale: LoRA's `lora_alpha / r`.
            betas: Decay of both moments.
            eps: Added to the denominator.
            weight_decay: Decoupled, of the factors.

        Raises:
            ValueError: A number can't be.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number of 1 or more, not {rank!r}.")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be zero or more, not {value!r}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be zero or more and less than 1, not {betas!r}.")
        defaults = {"lr": lr, "rank": rank, "scale": scale, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            found: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
            factored: list[Tensor] = []
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    _begin(state, p, group["rank"], number)
                state["step"] += 1
                gradient = p.grad
                if "b" not in state:
                    found.append((p, gradient, state["mean"], state["square"], state["step"]))
                    continue
                factored.append(p)
                a, b = state["a"], state["b"]
                gradient = gradient.to(a.dtype).reshape(*b.shape[:-1], a.shape[-1]) * group["scale"]
                for name, value, its in (("a", a, b.mT @ gradient), ("b", b, gradient @ a.mT)):
                    found.append((value, its, state[f"{name}_mean"], state[f"{name}_square"], state["step"]))
            if found:
                _adamw(found, group)
            for p in factored:
                state = self.state[p]
                delta = (state["b"] @ state["a"]).mul_(group["scale"]).view(p.shape)
                p.copy_(delta + state["start"] if "start" in state else delta)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of factors that are wider than their deltas: torch would cast them."""
        super().load_state_dict(state_dict)
        kept = state_dict["state"]
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, ours, strict=True):
            for name, value in kept.get(key, {}).items():
                if name.startswith(_FACTORS):
                    self.state[p][name] = value.to(p.device, copy=True)


def _begin(state: dict[str, Any], p: Tensor, rank: int, number: int) -> None:
    """What is kept of a parameter, the `number`-th of its optimizer."""
    state["step"] = 0
    layer = layer_of_delta(p)
    if layer is None:
        state |= {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        return
    if bool(p.any()):  # waits for the device, once
        state["start"] = p.detach().clone()
    wide = torch.promote_types(p.dtype, torch.float32)
    *experts, rows, columns = p.flatten(layer.delta_column_dim % p.dim()).shape
    bound, drawn = columns**-0.5, torch.Generator().manual_seed(number)
    a = torch.empty(*experts, rank, columns, dtype=wide).uniform_(-bound, bound, generator=drawn)
    state["a"], state["b"] = a.to(p.device), torch.zeros(*experts, rows, rank, dtype=wide, device=p.device)
    for name in _FACTORS:
        state[f"{name}_mean"], state[f"{name}_square"] = (torch.zeros_like(state[name]) for _ in range(2))


def _adamw(found: list[tuple[Tensor, Tensor, Tensor, Tensor, int]], group: dict[str, Any]) -> None:
    """AdamW's step of values with their gradients, moments and numbers of steps."""
    values, gradients, means, squares = (list(column) for column in list(zip(*found, strict=True))[:4])
    (first, second), rate = group["betas"], group["lr"]
    torch._foreach_lerp_(means, gradients, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, [(1 - second**step) ** 0.5 for *_, step in found])
    torch._foreach_add_(sizes, group["eps"])
    if group["weight_decay"]:
        torch._foreach_mul_(values, 1 - rate * group["weight_decay"])
    torch._foreach_addcdiv_(values, means, sizes, [-rate / (1 - first**step) for *_, step in found])

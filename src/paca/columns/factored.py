"""AdamW on two factors of each delta: columns that learn as LoRA does, and cost what columns do."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from paca.columns.resident import WRITING
from paca.columns.stepping import owner_of_delta
from paca.functional.factored import FactorGradient, Factors
from paca.functional.linear import LinearProduct
from paca.functional.product import FACTORED

_FACTORS = ("a", "b")


class FactoredAdamW(torch.optim.Optimizer):
    """AdamW that keeps each of PaCA's deltas as `scale * B A`, and steps `A` and `B` as it would LoRA's.

    A delta `(out_features, r)` is computed from `B (out_features, rank)`, zeros at first, and `A (rank, r)`, drawn as
    PEFT draws LoRA's (the same on every process); of convolutions `r` times the kernel's size, of experts one pair for
    each. What a layer learns is of rank `rank` in its `r` columns. Moments are of the factors' sizes. Factors are
    float32 (float64 for float64 deltas).

    The backward pass of a linear layer makes gradients of the factors alone, which takes less time and memory than the
    delta's: `delta.grad` stands for both then. It is added to, scaled and clipped as LoRA's gradients are, and has no
    values of the delta's. Other kinds of layers, compiled ones and several processes (DDP) make the delta's, from which
    those of the factors follow in the step, and whose norm is what gradients are clipped by; so do deltas that are
    hooked (`register_hook`), or that two of these optimizers hold.

    Parameters that are no deltas of PaCA, such as those of `modules_to_save`, are stepped by AdamW. A delta that is
    not zero at the first step, or that was written between two steps (an adapter is loaded over it), is kept as the
    start that the factors add to. Let `paca_alpha` be `r`: what it is over `r` multiplies `scale`.

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
        seed: int = 0,
    ) -> None:
        """Args:
            params: As for any optimizer of torch.
            lr: The rate of both factors. LoRA's rates fit, not PaCA's.
            rank: Of the factors.
            scale: LoRA's `lora_alpha / r`.
            betas: Decay of both moments.
            eps: Added to the denominator.
            weight_decay: Decoupled, of the factors.
            seed: Of the draws of `A`. With one optimizer for each parameter, give each its own.

        Raises:
            ValueError: A number can't be.
        """
        self.seed = seed
        defaults = {"lr": lr, "rank": rank, "scale": scale, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; `ValueError` for a number that can't be."""
        values = {**self.defaults, **param_group}
        rank, betas = values["rank"], values["betas"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number of 1 or more, not {rank!r}.")
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= values[name] < math.inf:
                raise ValueError(f"{name} must be zero or more, not {values[name]!r}.")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers of zero or more and less than 1, not {betas!r}.")
        super().add_param_group(param_group)
        self._hold()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for its in self.state.values():  # a parameter that was copied, or saved, counts its versions anew
            its.pop("version", None)
        self._hold()

    def _hold(self) -> None:
        """Let backward passes know whose deltas' factors are stepped here."""
        numbered = enumerate(((p, group) for group in self.param_groups for p in group["params"]), 1)
        self._held = [_Parameter(self, p, group, number) for number, (p, group) in numbered]
        FACTORED.update({id(held.parameter): held for held in self._held})

    def begin(self) -> None:
        """Make now what is kept of each parameter, which else is made as it is needed."""
        for held in self._held:
            if not self.state[held.parameter]:
                held.begin(self.state[held.parameter])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients; returns what `closure` does.

        Raises:
            ValueError: None of the parameters is a delta of PaCA.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours = [p for group in self.param_groups for p in group["params"]]
        if not self.state and not any(map(layer_of_delta, ours)):
            raise ValueError(
                "FactoredAdamW holds no delta of PaCA, so it has nothing to factor: its parameters are copies (of "
                "DeepSpeed, or in another dtype), or another method's. Give it the adapted model's, or take AdamW."
            )
        if list(map(id, ours)) != [id(held.parameter) for held in self._held]:
            self._hold()
        for p in ours:
            if isinstance(p.grad, FactorGradient):
                p.grad.check_of(self.defaults, self.state[p].get("a"))
        with torch.autocast(ours[0].device.type, enabled=False):
            self._step()
        return loss

    def _step(self) -> None:
        held = iter(self._held)
        for group in self.param_groups:
            found: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []
            factored: list[Tensor] = []
            for p in group["params"]:
                one = next(held)
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    one.begin(state)
                elif "b" in state and state.get("version") != p._version:
                    _look_at(state, p, group["scale"])
                state["step"] += 1
                if "b" not in state:
                    found.append((p, p.grad, state["mean"], state["square"], state["step"]))
                    continue
                factored.append(p)
                for name, its in zip(_FACTORS, _gradients(state, p, group["scale"]), strict=True):
                    moments = state[f"{name}_mean"], state[f"{name}_square"]
                    found.append((state[name], its, *moments, state["step"]))
            if found:
                _adamw(found, group)
            for p in factored:
                state = self.state[p]
                _write(state, p, group["scale"])
                state["version"] = p._version

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also of factors that are wider than their deltas: torch would cast them.

        Raises:
            ValueError: It is another optimizer's.
        """
        kept = state_dict["state"]
        if any(state and "b" not in state and "square" not in state for state in kept.values()):
            raise ValueError("This state is another optimizer's. FactoredAdamW goes on from its own alone.")
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, ours, strict=True):
            for name, value in kept.get(key, {}).items():
                if name.startswith(_FACTORS):
                    self.state[p][name] = value.to(p.device, copy=True)


class _Parameter:
    """A parameter of a `FactoredAdamW`."""

    def __init__(self, optimizer: FactoredAdamW, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        before = FACTORED.get(id(parameter))
        others = [] if before is None else [by for by in before.optimizers if by() is not optimizer]
        self.optimizers, self.parameter, self.group = [weakref.ref(optimizer), *others], parameter, group
        self.drawn_with = optimizer.seed * 1_000_003 + number

    def factors(self) -> Factors | None:
        """Those whose gradients backward passes make in place of the delta's; None where its own is needed."""
        optimizer, *others = [held_by() for held_by in self.optimizers]
        if optimizer is None or any(others) or not is_matrix(self.parameter):
            return None  # either of two may step next
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None  # whose buckets hold gradients of the parameters' own sizes
        state = optimizer.state.get(self.parameter)
        if not state or (state["step"] == 0 and state["a"].device != self.parameter.device):  # moved since
            with WRITING:  # another thread may be at it
                state = optimizer.state[self.parameter]
                if not state or state["a"].device != self.parameter.device:
                    self.begin(state)
        return Factors(state["a"], state["b"], self.group["scale"], self.parameter, optimizer.defaults)

    def begin(self, state: dict[str, Any]) -> None:
        """Make what is kept of the parameter: at its first pass, or its first step."""
        p, layer = self.parameter, layer_of_delta(self.parameter)
        if layer is None:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            return
        made = {"start": p.detach().clone()} if is_trained(p) else {}
        wide, rank = torch.promote_types(p.dtype, torch.float32), self.group["rank"]
        *experts, rows, columns = p.flatten(layer.delta_column_dim % p.dim()).shape
        bound, drawn = columns**-0.5, torch.Generator().manual_seed(self.drawn_with)
        a = torch.empty(*experts, rank, columns, dtype=wide, device="cpu").uniform_(-bound, bound, generator=drawn)
        made |= {"a": a.to(p.device), "b": torch.zeros(*experts, rows, rank, dtype=wide, device=p.device)}
        for name in _FACTORS:
            made |= {f"{name}_{moment}": torch.zeros_like(made[name]) for moment in ("mean", "square")}
        state |= {"step": 0, **made, "version": p._version}


def is_matrix(parameter: Tensor) -> bool:
    """Whether it is the delta of a linear layer."""
    layer = layer_of_delta(parameter) if parameter.dim() == 2 else None  # experts' have a third dimension
    return layer is not None and isinstance(layer.base_layer.product(), LinearProduct)


def is_trained(delta: Tensor) -> bool:
    """Whether a delta is not zero. Waits for the device."""
    return bool(delta.any())


def layer_of_delta(parameter: Tensor) -> Any:
    """Whose delta it is, or what FSDP2 shards one as: an adapted layer, or None."""
    found = owner_of_delta(parameter)
    return None if found is None else found[0]()


def _delta(state: dict[str, Any], p: Tensor, scale: float) -> Tensor:
    """What the factors make of a delta, in their dtype."""
    delta = (state["b"] @ state["a"]).mul_(scale).view(p.shape)
    return delta + state["start"] if "start" in state else delta


def _gradients(state: dict[str, Any], p: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of `a` and `b`: those that backward passes made, or what follows from the delta's."""
    gradient: Any = p.grad
    if isinstance(gradient, FactorGradient):
        return gradient.of_a, gradient.of_b
    return Factors(state["a"], state["b"], scale, p, None).follow(gradient, _dtype_of_products(p, state["a"]))


def _dtype_of_products(p: Tensor, factor: Tensor) -> torch.dtype:
    """A delta's gradient is a product of bfloat16 weights' activations, and so can be those that go on from it."""
    layer = layer_of_delta(p)
    halves = layer is not None and layer.base_layer.weight_placement()[1] == torch.bfloat16
    fast = p.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if halves and fast and factor.dtype == torch.float32 else factor.dtype


def _write(state: dict[str, Any], p: Tensor, scale: float) -> None:
    """Make a delta what its factors make; at once where it can be, as it is large beside them."""
    a, b = state["a"], state["b"]
    if "start" in state or p.dtype != a.dtype or a.dim() > 2 or not p.is_contiguous():
        p.copy_(_delta(state, p, scale))
    else:
        p.view(b.shape[0], a.shape[1]).addmm_(b, a, beta=0, alpha=scale)


def _look_at(state: dict[str, Any], p: Tensor, scale: float) -> None:
    """A delta was written since the last step, or its factors were loaded: is it another one than they make?"""
    made, last_bits = _delta(state, p, scale), 4 * torch.finfo(p.dtype).eps  # of another device, or of more threads
    if not torch.allclose(p.to(made.dtype), made, rtol=last_bits, atol=last_bits * float(made.abs().max())):
        state.pop("start", None)
        state["start"] = (p.to(made.dtype) - _delta(state, p, scale)).clone()


def _adamw(found: list[tuple[Tensor, Tensor, Tensor, Tensor, int]], group: dict[str, Any]) -> None:
    """AdamW's step of values with their gradients, moments and numbers of steps."""
    values, gradients, means, squares = (list(column) for column in list(zip(*found, strict=True))[:4])
    on_cpu = all(value.device.type == "cpu" for value in values)  # where one pass over memory is what counts
    first, second = group["betas"]
    adamw(
        values,
        gradients,
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=[torch.tensor(step - 1.0, device="cpu") for *_, step in found],  # which it counts up
        foreach=not on_cpu,
        fused=on_cpu,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

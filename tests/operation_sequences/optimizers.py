"""The optimizers that sequences train with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim


class ByHand(optim.Optimizer):
    """Changes each parameter that has a gradient by `change`."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.change(parameter, parameter.grad, group["lr"])

    def change(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        raise NotImplementedError


class SignStep(ByHand):
    """Writes through `.data`, which moves no version counter, as some optimizers of others do."""

    def change(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        parameter.data.sub_(gradient.sign(), alpha=lr)


class ReplacesData(ByHand):
    """Gives each parameter new memory."""

    def change(self, parameter: Tensor, gradient: Tensor, lr: float) -> None:
        parameter.data = parameter.data - lr * gradient


class Perturbs(optim.Optimizer):
    """Estimates gradients by itself, as MeZO does: writes also what has no gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        generator = torch.Generator().manual_seed(5)
        for group in self.param_groups:
            for parameter in group["params"]:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.add_(noise.to(parameter.dtype), alpha=group["lr"])


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "SGD": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=False),
    "Adam": lambda p: optim.Adam(p, 0.02, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 0.02),
    "AdamW fused": lambda p: optim.AdamW(p, 0.02, fused=True),
    "AdamW foreach": lambda p: optim.AdamW(p, 0.02, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, 0.02),
    "RAdam": lambda p: optim.RAdam(p, 0.05),
    "Adamax": lambda p: optim.Adamax(p, 0.02),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.05),
    "Adafactor": lambda p: optim.Adafactor(p, 0.05),
    "Muon": lambda p: optim.Muon(p, 0.02),
    "LBFGS": lambda p: optim.LBFGS(p, 0.05, max_iter=2),
    "sign, through .data": lambda p: SignStep(p, 0.01),
    "new memory": lambda p: ReplacesData(p, 0.05),
    "perturbs": lambda p: Perturbs(p, 0.01),
}

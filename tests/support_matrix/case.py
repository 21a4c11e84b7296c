"""What an operation gets: an adapted model of a row, its inputs, and the float64 reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import adapt
from paca.layers import PacaLayer
from support_matrix.subject import Subject

PREFIX = "base_model.model."
STRENGTH = 0.3
"""Of the random deltas: large, so that an effect that is missing shows."""


class Explained(Exception):
    """There is nothing to do here, for the reason given, which the operation has checked."""


class Case:
    """A fresh model of `subject`, with the adapter `default`."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder
        self.x = subject.inputs()
        self.model = self.adapted()

    def adapted(self, seed: int = 3, **settings: Any) -> Any:
        """The subject's base model with an adapter of random values."""
        model = adapt(
            self.subject.base(self.folder), **{"r": 2, "paca_alpha": 3, **self.subject.targets, **settings}
        ).eval()
        randomize(model, "default", seed)
        return model

    def add_second(self) -> None:
        """Add the adapter `second`, of another rank, with other columns; it is not active."""
        config: Any = self.model.peft_config["default"]
        self.model.add_adapter("second", dataclasses.replace(config, r=1, paca_alpha=1, random_seed=7))
        self.model.eval()
        randomize(self.model, "second", 4)

    def layers(self, model: Any = None) -> dict[str, PacaLayer]:
        """The adapted layers by their names in the base model."""
        found = (model or self.model).named_modules()
        return {name.removeprefix(PREFIX): m for name, m in found if isinstance(m, PacaLayer)}

    # -- the reference --------------------------------------------------------------------------------------------

    def dense(self, adapters: dict[str, float], dtype: torch.dtype = torch.float64) -> nn.Module:
        """The stock model with `adapters`' columns, times a factor each, in its weights, which require grad."""
        twin = self.subject.plain().to(dtype)
        twin.requires_grad_(False)
        for name, layer in self.layers().items():
            weight = weight_of(twin, name)
            total = weight.data.double()
            for adapter, factor in adapters.items():
                if adapter in layer.paca_delta:
                    delta = layer.paca_delta[adapter].detach().double() * (factor * layer.scaling[adapter])
                    change = delta.mT if self.subject.column_dim in (0, -2) else delta
                    total = total.index_add(self.subject.column_dim, layer.paca_indices[adapter], change)
            weight.data = total.to(dtype)
            weight.requires_grad_()
        return twin

    def column_gradient(self, twin: nn.Module, name: str, adapter: str) -> Tensor:
        """The gradient of a delta, from that of the dense weight."""
        layer, dim = self.layers()[name], self.subject.column_dim
        gradient = weight_of(twin, name).grad
        assert gradient is not None
        gradient = gradient.index_select(dim, layer.paca_indices[adapter]) * layer.scaling[adapter]
        return gradient.mT if dim in (0, -2) else gradient

    def reference(
        self, rows: list[int] | None = None, **adapters: float
    ) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """Output in float64, and the gradients of the deltas for the mean (of `rows`: the sum) of its squares.

        Args:
            rows: Only these samples count for the loss.
            adapters: The factor of each.
        """
        twin = self.dense(adapters)
        x = self.x.double() if self.x.is_floating_point() else self.x
        with torch.enable_grad():
            y = run(twin, x)
            (y.square().mean() if rows is None else y[rows].square().sum()).backward()
        return y.detach(), {
            (name, adapter): self.column_gradient(twin, name, adapter) for name in self.layers() for adapter in adapters
        }


def randomize(model: Any, adapter: str, seed: int) -> None:
    """Give the adapter random deltas."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"paca_delta.{adapter}" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STRENGTH)


def weight_of(plain: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer, or the stack of experts of that name."""
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    return parameters[name] if name in parameters else parameters[f"{name}.weight"]


def run(model: Any, x: Tensor, **settings: Any) -> Tensor:
    """The output, or the logits of a language model."""
    y = model(x, **settings)
    return getattr(y, "logits", y)


def stock(case: Case) -> nn.Module:
    """The base model by itself."""
    return case.subject.base(case.folder / "stock").train(case.subject.stock_training)


def stock_output(case: Case) -> Tensor:
    """What it gives."""
    return run(stock(case), case.x).detach()


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of those of the deltas."""
    found = [p.grad.clone() for name, p in model.named_parameters() if "paca_delta" in name and p.grad is not None]
    assert found
    return found


def close(found: Tensor | None, want: Tensor, tolerance: float = 2e-5) -> None:
    """Check that the relative error over the whole tensor is within `tolerance`, some hundred float32 roundings."""
    assert found is not None
    assert found.shape == want.shape
    error = (found.detach().double() - want.detach().double()).norm()
    assert error <= tolerance * want.detach().double().norm(), float(error / want.detach().double().norm())

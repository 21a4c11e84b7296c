"""A small model whose deltas `paca.FactoredAdamW` steps, and the gradients that it has."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

import paca
from paca.functional.factored import FactorGradient


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).double()
    config = paca.PacaConfig(**{"r": 8, "paca_alpha": 16, "target_modules": ["0", "2"], **settings})
    return peft.get_peft_model(model, config)


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def after_a_step(**settings: Any) -> tuple[Any, paca.FactoredAdamW]:
    """A model whose `B` is not zero any more."""
    model = adapted(**settings)
    optimizer = paca.FactoredAdamW(trained(model), lr=0.1, rank=3, scale=2.0)
    model(batch()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def of_the_factors(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    gradients: list[Any] = [p.grad for p in trained(model)]
    assert all(isinstance(gradient, FactorGradient) for gradient in gradients)
    return [(gradient.of_a, gradient.of_b) for gradient in gradients]


def twice(model: Any) -> None:
    for seed in (2, 3):
        model(batch(seed)).square().sum().backward()

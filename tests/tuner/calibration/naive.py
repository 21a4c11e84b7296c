"""The scores of columns written out in float64: whole inputs, whole weight gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def reference_inputs(model: Any, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """All inputs `(n, in_features)` of a layer in float64, without padding."""
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, y: rows.append(args[0].detach().double()))
    model.eval()
    kept = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            x = rows.pop()
            mask = batch.get("attention_mask", torch.ones(x.shape[:-1]))
            kept.append(x[mask.bool()])
    handle.remove()
    return torch.cat(kept)


def reference_gradient_norms(model: Any, name: str, batches: list[dict[str, Tensor]], input_dim: int = 1) -> Tensor:
    """The root of the squared norms of the weight gradient's columns, summed over the batches."""
    model.eval()
    weight = model.get_submodule(name).weight
    squares: Any = 0
    for batch in batches:
        model.zero_grad()
        weight.requires_grad_(True)
        model(**batch).loss.backward()
        gradient = weight.grad.double().movedim(input_dim, -1)
        squares = squares + gradient.square().flatten(0, -2).sum(0)
    model.zero_grad()
    return squares.sqrt()


def best(scores: Tensor, r: int) -> list[int]:
    """The numbers of the `r` largest scores; of equal ones the first."""
    order = sorted(range(scores.numel()), key=lambda column: (-float(scores[column]), column))
    return sorted(order[:r])


class Convolutions(nn.Module):
    """A grouped convolution, an in-place activation and a linear layer; returns a scalar loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.activation = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 4, (3, 1), padding="same", padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x))).square().mean()

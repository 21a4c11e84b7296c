"""Ways of choosing PaCA's columns that are being tried out; those that paca has itself come from `paca.select`.

All look at one thing: how the inputs of a linear layer vary together, over the tokens that matter. A channel that
hardly varies acts like a bias; two that vary together give the trained columns one direction instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]


class Covariance:
    """The weighted covariance of a layer's input channels, from rows that come in pieces."""

    def __init__(self) -> None:
        self.shift: Tensor | None = None  # near the mean, so that nothing cancels in float32

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Take in `rows (n, channels)`, each counted `weights (n,)` times."""
        rows, weights = rows.float(), weights.double()
        if self.shift is None:
            self.shift = rows.mean(0)
            self.total = torch.zeros((), dtype=torch.float64)
            self.first = torch.zeros(rows.shape[1], dtype=torch.float64)
            self.second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows - self.shift
        weighted = rows * weights.float()[:, None]
        self.total += weights.sum()
        self.first += weighted.double().sum(0)
        self.second += (weighted.T @ rows).double()

    def matrix(self) -> Tensor:
        """`(channels, channels)`, float64."""
        mean = self.first / self.total
        return self.second / self.total - torch.outer(mean, mean)


def pivoted(covariance: Tensor, r: int) -> list[int]:
    """`r` of the `8 r` channels of the largest variance, none of which the others foretell.

    Each is the one with the most variance left once the channels taken before it have explained what they can: a
    Cholesky factorization with pivoting, r steps of it.
    """
    candidates = covariance.diagonal().sort(descending=True, stable=True).indices[: 8 * r]
    rest = covariance[candidates][:, candidates].clone()
    floor = 1e-9 * rest.diagonal().max()
    chosen: list[int] = []
    for _ in range(min(r, len(candidates))):
        left = rest.diagonal().clone()
        left[chosen] = -1.0
        pivot = int(left.argmax())
        chosen.append(pivot)
        column = rest[:, pivot].clone()
        rest -= torch.outer(column, column) / column[pivot].clamp_min(floor)
    return candidates[chosen].sort().values.tolist()


STRATEGIES = {"pivoted_answer_variance": "answers", "pivoted_gradient_variance": "gradients"}
"""Name: what a token counts in the covariance. `answers`: 1 if the loss falls on what the model says there, else 0,
which leaves out the first tokens with their outsized activations; `gradients`: the squared norm of the loss's
gradient in the layer's output at that token."""


def choose(strategy: str, model: Any, r: int, batches: Iterable[Batch], loss: Loss) -> dict[str, list[int]]:
    """The columns of every linear layer but the output layer, by name.

    Args:
        strategy: One of `STRATEGIES`.
        model: A causal language model, without adapters.
        r: Columns a layer.
        batches: For calibration, with labels.
        loss: Of the model on a batch.
    """
    covariances = covariances_of(model, STRATEGIES[strategy], batches, loss)
    return {name: pivoted(found.matrix(), r) for name, found in covariances.items()}


def covariances_of(model: Any, weights: str, batches: Iterable[Batch], loss: Loss) -> dict[str, Covariance]:
    """Run the batches through `model`; arguments as in `choose`, `weights` of `STRATEGIES`."""
    output_layer = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output_layer}
    covariances = {name: Covariance() for name in layers}
    counted = torch.empty(0)

    def watch(covariance: Covariance) -> Any:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            rows = args[0].detach().flatten(0, -2)
            if weights == "answers":
                covariance.add(rows[counted], torch.ones(int(counted.sum())))
            else:
                output.register_hook(lambda g: covariance.add(rows, g.float().square().sum(-1).flatten()))

        return note

    hooks = [layer.register_forward_hook(watch(covariances[name])) for name, layer in layers.items()]
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    model.requires_grad_(False).eval()
    try:
        for batch in batches:
            counted = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)).flatten()
            with torch.set_grad_enabled(weights == "gradients"):
                value = loss(model, batch)
            if weights == "gradients":
                value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return covariances

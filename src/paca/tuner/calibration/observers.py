"""What is kept of a layer while calibration batches run through it: a few numbers for each input column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paca.layers import PacaLayer
from paca.tuner.calibration.moments import Moments
from paca.tuner.calibration.padding import Padding
from paca.tuner.calibration.weight_gradients import convolution_squares, embedding_squares, linear_squares

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Observer:
    """Collects the scores of one layer's columns.

    Args:
        key: what the model calls the layer.
        module: the layer, adapted or not.
        in_features: how many columns it has.
        strategy: one of ``paca.selection.FROM_BATCHES``.
    """

    def __init__(self, key: str, module: nn.Module, in_features: int, strategy: str) -> None:
        self.key, self.module, self.strategy = key, module, strategy
        self.stock: Any = module.base_layer if isinstance(module, PacaLayer) else module
        self.count = 0
        """Rows of its input so far, that had a gradient if one is needed: tokens, and of a convolution pixels."""
        self._ran = False
        self.padding = Padding(None, 0)
        """Of the batch that runs."""
        self._in_features = in_features
        self._moments = Moments(in_features)
        self._squares = torch.zeros(in_features, dtype=torch.float64)

    def scores(self) -> Tensor:
        """``(in_features,)``: what the columns are ranked by.

        Raises:
            ValueError: if nothing was seen.
        """
        if self.count == 0 and self._ran:
            raise ValueError(
                f"{self.key}: no gradient reached this layer, so that {self.strategy} can't rank its columns. Either "
                "the loss does not depend on it, or a layer after it gives no gradient with respect to its input (some "
                "quantized layers are for inference only). Leave it out of target_modules, or choose another selection."
            )
        if self.count == 0:
            raise ValueError(
                f"{self.key}: no token of the batches reached this layer, so that {self.strategy} can't rank its "
                "columns. Give more batches (an expert may be chosen rarely), or leave the layer out of target_modules."
            )
        if self.strategy == "gradient_norm":
            return self._squares.sqrt()
        return self._moments.norms() if self.strategy == "activation_norm" else self._moments.variances()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def see_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        """A forward hook, for strategies that need no gradient."""
        x = _input(args, kwargs)
        with torch.no_grad():
            if isinstance(self.stock, nn.Embedding):
                rows = self.padding.without(y, self.key)
            elif isinstance(self.stock, _CONVOLUTIONS):
                rows = self._channel_rows(x)
            else:
                rows = self.padding.without(x, self.key)
            self._moments.add(rows)
            self.count = self._moments.count

    def watch_backward(self, anchor: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        """A forward hook that lets the backward pass come by.

        Args:
            anchor: a scalar that requires grad, so that gradients are computed although no weight wants any.
        """

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            self._ran = True
            watched: Tensor = _Watch.apply(y, _input(args, kwargs), anchor, self)
            return watched

        return hook

    def see_backward(self, x: Tensor, grad_output: Tensor) -> None:
        """Take in the gradient of one forward pass with input ``x``."""
        if isinstance(self.stock, nn.Embedding):
            rows = self.padding.without(grad_output, self.key)
            tokens = self.padding.without(x[..., None], self.key).flatten()
            if self.stock.padding_idx is not None:
                rows = rows * (tokens != self.stock.padding_idx)[:, None]
            squares, count = embedding_squares(tokens, rows), tokens.numel()
        elif isinstance(self.stock, _CONVOLUTIONS):
            count = self._channel_rows(x).shape[0]
            squares = convolution_squares(x, grad_output, self.stock)
        else:
            rows = self.padding.without(x, self.key)
            squares = linear_squares(rows, self.padding.without(grad_output.to(x.device), self.key))
            count = rows.shape[0]
        self._squares = self._squares.to(squares)
        self._squares += squares
        self.count += count

    def _channel_rows(self, x: Tensor) -> Tensor:
        """A convolution's input as ``(positions * groups, in_channels / groups)``: a row for each place and group."""
        channels_last = x.movedim(-1 - len(self.stock.kernel_size), -1)
        return self.padding.without(channels_last, self.key).reshape(-1, self._in_features)


class _Watch(torch.autograd.Function):
    """The identity of ``y``, whose backward pass shows the observer its gradient beside the layer's input.

    The input is saved as autograd saves tensors, so that activation checkpointing recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, observer: Observer) -> Tensor:
        ctx.observer = observer
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return y.clone()  # an alias could not be written in place, as activations do

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad_output is None:  # what follows gives no gradient
            return None, None, None, None
        (x,) = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(grad_output.device.type, enabled=False):
            ctx.observer.see_backward(x.detach(), grad_output)
        return grad_output, None, None, None


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values: Any = (*args, *kwargs.values())
    return values[0]

"""What is kept of a layer while calibration batches run through it: a few numbers for each input column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.scores import weight_norms, widest
from paca.functional.convolution import ConvolutionProduct
from paca.functional.embedding import EmbeddingProduct
from paca.functional.linear import LinearProduct
from paca.functional.product import Product
from paca.layers import PacaLayer
from paca.tuner.calibration.batches import without_padding

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AT_ONCE = 2**20  # values of a gradient, or of rows in the accumulators' type, that are there at a time: 4 or 8 MiB


class Moments:
    """Streaming moments of `channels` channels: two numbers each, whatever comes in.

    Pieces are merged by Chan, Golub and LeVeque's update (1979), so that a channel whose mean is far from zero keeps
    its variance.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._centred = torch.zeros(channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in `rows (n, channels)` of any dtype."""
        if self.count == 0:
            self._mean = self._mean.to(rows.device, widest(rows.device))
            self._centred = self._centred.to(self._mean)
        for piece in rows.split(max(1, _AT_ONCE // max(1, rows.shape[1]))):
            n = piece.shape[0]
            if n == 0:
                continue
            values = piece.to(self._mean)
            variance, mean = torch.var_mean(values, 0, correction=0)
            shift = mean - self._mean
            self._centred += variance * n + shift.square() * (self.count * n / (self.count + n))
            self._mean += shift * (n / (self.count + n))
            self.count += n

    def norms(self) -> Tensor:
        """The Euclidean norm of each channel over all rows, `(channels,)`."""
        return (self._centred + self.count * self._mean.square()).sqrt()

    def variances(self) -> Tensor:
        """The mean square of each channel's distance from its mean, `(channels,)`."""
        return self._centred / max(1, self.count)


class Observer:
    """Collects the scores of one layer's columns: of `module`, adapted or not, which the model calls `key`."""

    def __init__(self, key: str, module: nn.Module, in_features: int, strategy: str) -> None:
        self.key, self.module, self.in_features, self.strategy = key, module, in_features, strategy
        self.stock: Any = module.base_layer if isinstance(module, PacaLayer) else module
        self.real: Tensor | None = None
        """Which tokens of the batch that runs are no padding."""
        self.count = 0
        """Rows of its input so far, that had a gradient if one is needed: tokens, and of a convolution pixels."""
        self._ran = False
        self._moments = Moments(in_features)
        self._squares = torch.zeros(in_features, dtype=torch.float64)

    def scores(self) -> Tensor:
        """`(in_features,)`: what the columns are ranked by; `ValueError` if nothing was seen."""
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

    def see_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        """A forward hook, for strategies that need no gradient."""
        self._moments.add(self._rows(y if isinstance(self.stock, nn.Embedding) else _input(args, kwargs)))
        self.count = self._moments.count

    def watch_backward(
        self, anchor: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """A forward hook that lets the backward pass come by.

        Its `anchor`, a scalar, requires grad, so that gradients are computed although no weight wants any.
        """
        self._ran = True
        watched: Tensor = _Watch.apply(y, _input(args, kwargs), anchor, self)
        return watched

    def see_backward(self, x: Tensor, grad_output: Tensor) -> None:
        """Take in the gradient of one forward pass with input `x`: the norms of the weight gradient's columns."""
        rows, stock, product = x, self.stock, _product_of(self.stock)
        shape: tuple[int, ...] = grad_output.shape[-1:]
        if isinstance(stock, nn.Embedding):
            grad_output, tokens = self._rows(grad_output), self._rows(x[..., None]).flatten()
            self.count += tokens.numel()
            if stock.padding_idx is not None:
                grad_output = grad_output * (tokens != stock.padding_idx)[:, None]
            occurring, rows = tokens.unique(return_inverse=True)  # the others' rows are zero
            shape = occurring.shape
        elif isinstance(product, ConvolutionProduct):
            self.count += self._rows(x).shape[0]
            shape = (stock.out_channels, *stock.kernel_size)
        else:
            rows, grad_output = self._rows(x), self._rows(grad_output.to(x.device))
            self.count += rows.shape[0]
        dtype = torch.promote_types(grad_output.dtype, torch.float32)
        dtype = torch.promote_types(rows.dtype, dtype) if rows.is_floating_point() else dtype
        grad_output, squares = grad_output.to(dtype), []
        columns = torch.arange(self.in_features, device=rows.device)
        for part in columns.split(max(1, _AT_ONCE // max(1, torch.Size(shape).numel()))):
            selected = product.select(rows, part, None)
            selected = selected.to(dtype) if selected.is_floating_point() else selected
            size = torch.Size((shape[0], part.numel(), *shape[1:]))
            gradient = product.delta_gradient(selected, grad_output, part, 1.0, size, dtype)
            squares.append(weight_norms(gradient, 1).square())
        self._squares = self._squares.to(squares[0])
        self._squares += torch.cat(squares)

    def _rows(self, values: Tensor) -> Tensor:
        """Inputs or gradients as rows, `(n, channels)`; of a convolution a row for each place and group."""
        if isinstance(self.stock, _CONVOLUTIONS):
            values = values.movedim(-1 - len(self.stock.kernel_size), -1)
            return without_padding(values, self.real, self.key).reshape(-1, self.in_features)
        return without_padding(values, self.real, self.key)


def _product_of(stock: Any) -> Product:
    """What the layer computes, with its weight as `(out_features, in_features)`."""
    if isinstance(stock, nn.Embedding):
        return EmbeddingProduct(-1, stock.scale_grad_by_freq)
    if isinstance(stock, _CONVOLUTIONS):
        return ConvolutionProduct.of(stock)
    return LinearProduct(1)


class _Watch(torch.autograd.Function):
    """The identity of `y`, whose backward pass shows the observer its gradient beside the layer's input.

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

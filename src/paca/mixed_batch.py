"""Mixed batches: each sample of a batch with an adapter of its own.

The weight can hold one set of columns at a time, so for a mixed batch it holds none: it is the pretrained one, and each
adapter's rows get ``scale * x[..., indices] @ delta.T`` on top. That is one gather and one skinny GEMM per adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional import column_gradient

BASE = "__base__"
"""The name that PEFT gives to the model without an adapter."""


class MixedBatch:
    """Which sample of a batch runs with which adapter.

    Args:
        names: one adapter's name per sample; ``"__base__"`` for none.
        repeats: how often generation repeats each sample (beams, several answers); then the samples of a layer's
            input may be repeated so, or not (an encoder's are not).
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names = tuple(names)
        self.repeats = repeats
        self.tag = hash((self.names, repeats))
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def names_of(self, samples: int) -> tuple[str, ...]:
        """The adapters of a layer's input that has ``samples`` of them, in its order.

        Raises:
            ValueError: if there are not as many names.
        """
        if samples == len(self.names):
            return self.names
        if samples == len(self.names) * self.repeats:
            return tuple(name for name in self.names for _ in range(self.repeats))
        repeated = f", each repeated {self.repeats} times," if self.repeats > 1 else ""
        raise ValueError(
            f"adapter_names gives {len(self.names)} names{repeated} for an input with {samples} samples. Give one name "
            f"per sample, {BASE!r} for the base model. (A layer that sees single tokens instead of samples, such as a "
            "router of experts, can't run a mixed batch.)"
        )

    def rows_of(self, samples: int, device: torch.device) -> dict[str, Tensor]:
        """Per adapter, the numbers of its samples, ``(samples of it,)`` int64 on ``device``; without ``"__base__"``."""
        key = (samples, device)
        if key not in self._rows:  # once per batch, not once per layer
            groups: dict[str, list[int]] = {}
            for number, name in enumerate(self.names_of(samples)):
                groups.setdefault(name, []).append(number)
            groups.pop(BASE, None)
            self._rows[key] = {name: torch.tensor(rows, device=device) for name, rows in groups.items()}
        return self._rows[key]


_CURRENT: ContextVar[MixedBatch | None] = ContextVar("paca_mixed_batch", default=None)


def current_mixed_batch() -> MixedBatch | None:
    """The mixed batch that this thread is running, if any."""
    return _CURRENT.get()


@contextmanager
def running(batch: MixedBatch) -> Iterator[None]:
    """Make ``batch`` the current one of this thread; other threads don't see it."""
    token = _CURRENT.set(batch)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class RowColumns(NamedTuple):
    """The trained columns of one adapter, and the samples they are for."""

    rows: Tensor
    """``(samples of this adapter,)`` int64; no two adapters share one."""
    delta: Tensor
    """``(out_features, r)``."""
    indices: Tensor
    """``(r,)`` int64."""
    scale: float


def add_columns_by_row(
    y: Tensor,
    x: Tensor,
    groups: Sequence[RowColumns],
    *,
    batch_tag: int = 0,
    after_backward: Callable[[], None] | None = None,
) -> Tensor:
    """Add ``scale * x[rows][..., indices] @ delta.T`` to ``y[rows]``, for each of ``groups``.

    Products are taken in ``y``'s dtype and, where the backend can, added to ``y`` before the one rounding to it.

    Args:
        y: ``(samples, ..., out_features)``, what the pretrained weight gives. Without autograd it is written in place.
        x: ``(samples, ..., in_features)``, two dimensions or more.
        groups: the adapters' columns with their samples.
        batch_tag: names which sample runs with what, so that a forward pass that activation checkpointing repeats for
            other samples is noticed.
        after_backward: called when gradients were computed: an optimizer step may follow.

    Returns:
        ``(samples, ..., out_features)`` in ``y``'s dtype. Samples of no group are ``y``'s, bit for bit. Gradients go to
        ``y``, ``x`` and each ``delta`` (from its own samples only).
    """
    if not torch.is_grad_enabled():
        result = y.contiguous()
        for group in groups:
            _add(result, _selected(x, group).to(y.dtype), group)
        return result
    content = (batch_tag, *((id(g.delta), id(g.indices), g.scale) for g in groups))
    tag = torch.tensor(hash(content), dtype=torch.int64, device="cpu")
    scales = tuple(group.scale for group in groups)
    tensors = [tensor for group in groups for tensor in (group.rows, group.delta, group.indices)]
    return _AddColumnsByRow.apply(y, x, scales, after_backward, tag, *tensors)


def _places(x: Tensor, rows: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Index tensors, broadcast against each other, of ``x[rows][..., indices]``: the chosen values and no others."""
    ranges = [rows, *(torch.arange(size, device=x.device) for size in x.shape[1:-1]), indices]
    return tuple(r.view(-1, *[1] * (len(ranges) - 1 - n)) for n, r in enumerate(ranges))


def _selected(x: Tensor, group: RowColumns) -> Tensor:
    """``(samples of the group, ..., r)``, in ``x``'s dtype."""
    return x[_places(x, group.rows, group.indices)]


def _add(y: Tensor, selected: Tensor, group: RowColumns) -> None:
    part = y.index_select(0, group.rows)
    flat = part.view(-1, part.shape[-1])
    flat.addmm_(selected.reshape(-1, selected.shape[-1]), group.delta.to(y.dtype).t(), alpha=group.scale)
    y.index_copy_(0, group.rows, part)


class _AddColumnsByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        scales: tuple[float, ...],
        after_backward: Callable[[], None] | None,
        tag: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        tensors_of = zip(tensors[::3], tensors[1::3], tensors[2::3], scales, strict=True)
        groups = [RowColumns(*parts) for parts in tensors_of]
        result = y.clone(memory_format=torch.contiguous_format)  # hooks and autograd may hold y itself
        saved: list[Tensor | None] = []
        ctx.needed = [ctx.needs_input_grad[5 + 3 * n + 1] for n in range(len(groups))]
        for group, need in zip(groups, ctx.needed, strict=True):
            selected = _selected(x, group).to(y.dtype)
            _add(result, selected, group)
            saved += [group.rows, group.indices]
            saved.append(group.delta if ctx.needs_input_grad[1] else None)
            saved.append(selected if need else None)
        ctx.save_for_backward(tag, *saved)
        ctx.scales, ctx.after_backward, ctx.tag = scales, after_backward, int(tag)
        ctx.delta_dtypes = [group.delta.dtype for group in groups]
        ctx.x_shape, ctx.x_dtype, ctx.compute_dtype = x.shape, x.dtype, y.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        tag, *saved = ctx.saved_tensors
        if int(tag) != ctx.tag:
            raise RuntimeError(
                "Activation checkpointing repeated a forward pass of a mixed batch (adapter_names) with other adapters "
                "than it first ran with. Switch checkpointing off for mixed batches."
            )
        device_type = grad_output.device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                grad_x, grads = _gradients(ctx, grad_output, saved)
        else:
            grad_x, grads = _gradients(ctx, grad_output, saved)
        if ctx.after_backward is not None:
            ctx.after_backward()
        return grad_output, grad_x, None, None, None, *(g for grad in grads for g in (None, grad, None))


def _gradients(ctx: Any, grad_output: Tensor, saved: list[Any]) -> tuple[Tensor | None, list[Tensor | None]]:
    grad_x = grad_output.new_zeros(ctx.x_shape, dtype=ctx.x_dtype) if ctx.needs_input_grad[1] else None
    grads: list[Tensor | None] = []
    for n, scale in enumerate(ctx.scales):
        rows, indices, delta, selected = saved[4 * n : 4 * n + 4]
        grad_rows = grad_output.index_select(0, rows).to(ctx.compute_dtype)
        flat = grad_rows.reshape(-1, grad_rows.shape[-1])
        grads.append(column_gradient(selected, flat, scale, ctx.delta_dtypes[n]) if ctx.needed[n] else None)
        if grad_x is not None:
            part = torch.mm(flat, delta.to(flat.dtype)) * scale
            grad_x[_places(grad_x, rows, indices)] = part.view(*grad_rows.shape[:-1], -1).to(ctx.x_dtype)
    return grad_x, grads

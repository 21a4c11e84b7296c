"""Columns that no weight holds: what they contribute is added to what the stock layer made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_contributions(
    product: Any, y: Tensor, selected: list[Any], indices: Any, deltas: Any, scales: Any, rows: Any
) -> Tensor:
    """`y` with what the columns contribute, as a new tensor; `selected` becomes what each adapter's samples read."""
    # Hooks and autograd may hold it: it is not written.
    y = y.clone() if not deltas or any(r is not None for r in rows) else y
    with torch.autocast(y.device.type, enabled=False):
        for n, (i, delta) in enumerate(zip(indices, deltas, strict=True)):
            part = of_rows(selected[n], rows[n])
            selected[n] = part = part.to(y.dtype) if part.is_floating_point() else part
            sums = product.add_contribution(of_rows(y, rows[n]), part, i, delta, scales[n])
            y = sums if rows[n] is None else y.index_copy_(0, rows[n], sums)
    return y


def input_gradient_of_added(
    product: Any, grad_y: Tensor, input_size: torch.Size, indices: Any, deltas: Any, scales: Any, rows: Any
) -> Tensor:
    """What reaches the input through the added columns."""
    grad_x = grad_y.new_zeros(input_size)
    for n, delta in enumerate(deltas):
        part = grad_x if rows[n] is None else of_rows(grad_x, rows[n])
        product.add_input_gradient(part, of_rows(grad_y, rows[n]), indices[n], delta, scales[n])
        if rows[n] is not None:
            grad_x.index_copy_(0, rows[n], part)
    return grad_x


def of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """The samples `rows` of `tensor (samples, ...)`; all for None."""
    return tensor if rows is None else tensor.index_select(0, rows)


class AddedToLinear:
    """The part of the linear product that is about added columns."""

    def add_contribution(self, y: Tensor, selected: Tensor, indices: Tensor, delta: Tensor, scale: float) -> Tensor:
        columns = selected.reshape(-1, selected.shape[-1])
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), columns, delta.to(y.dtype).t(), alpha=scale)
        return torch.ops.aten._unsafe_view(flat, y.shape)

    def add_input_gradient(
        self, grad_x: Tensor, grad_output: Tensor, indices: Tensor, delta: Tensor, scale: float
    ) -> None:
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        part = torch.mm(rows, delta.to(rows.dtype)).mul_(scale)
        grad_x.index_add_(-1, indices, part.view(*grad_x.shape[:-1], indices.numel()))

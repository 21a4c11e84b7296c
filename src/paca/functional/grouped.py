"""The linear products of a stack of experts: each expert's rows meet its own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paca.functional.column_blocks import Runs, take_columns
from paca.functional.linear import column_gradient
from paca.functional.product import Product
from paca.functional.train_columns import in_dtype, scaled

GroupedMatmul = Callable[..., Tensor]
"""`(rows (tokens, k), matrices (experts, k, n), offs=(experts,)) -> (tokens, n)`, such as `torch._grouped_mm`."""


class GroupedProduct(Product):
    """Rows `x (tokens, in_features)` times their experts' weights; deltas are `(experts, out_features, r)`, with the
    same columns in every expert. An expert that got no rows gets a gradient of zeros.

    Args:
        input_dim: Of the stack that runs over the input features: -1 for `(experts, out_features, in_features)`, -2 for
            `(experts, in_features, out_features)`.
        offsets: `(experts,)` int: where each expert's rows end. Rows past the last are nobody's.
        matmul: Multiplies the groups; its results are the stock model's bit for bit.
    """

    def __init__(self, input_dim: int, offsets: Tensor, matmul: GroupedMatmul) -> None:
        self.input_dim, self.offsets, self.matmul = input_dim, offsets, matmul

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.matmul(x, weight.mT if self.input_dim == -1 else weight, offs=self.offsets)

    def select(self, x: Tensor, indices: Tensor, runs: Runs | None) -> Tensor:
        return take_columns(x, indices, runs)

    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        transposed = weight if self.input_dim == -1 else weight.mT  # (experts, out_features, in_features)
        return self.matmul(grad_output.contiguous(), transposed, offs=self.offsets)  # kernels refuse expanded rows

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        rows = grad_output.contiguous()
        if self.matmul is torch._grouped_mm:
            return self._gradient_by_kernel(selected, rows, scale, dtype)
        gradient = rows.new_zeros(size, dtype=dtype)  # expert by expert, where there is no such kernel
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                gradient[expert] = column_gradient(selected[start:end], rows[start:end], scale, dtype)
            start = end
        return gradient

    def _gradient_by_kernel(self, selected: Tensor, rows: Tensor, scale: Any, dtype: torch.dtype) -> Tensor:
        """All experts in one kernel; the host need not know the offsets.

        It rounds to the matmul's dtype once: torch 2.13 has no grouped kernel with a wider result.
        """
        r = selected.shape[1]
        missing = -r % (16 // selected.element_size())  # the kernel wants rows of whole 16 bytes
        columns = F.pad(selected, (0, missing)) if missing else selected
        product = torch._grouped_mm(columns.t(), rows, offs=self.offsets)[:, :r]  # (experts, r, out_features)
        return scaled(torch.empty(product.mT.shape, dtype=dtype, device=product.device).copy_(product.mT), scale)


class BatchedProduct(Product):
    """As many rows for each expert, `x (experts, rows, in_features)`; deltas and `input_dim` as of `GroupedProduct`."""

    def __init__(self, input_dim: int) -> None:
        self.input_dim = input_dim

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(x, weight.mT if self.input_dim == -1 else weight)

    select = staticmethod(take_columns)

    def input_gradient(self, grad_output: Tensor, weight: Tensor, input_size: torch.Size) -> Tensor:
        transposed = weight if self.input_dim == -1 else weight.mT  # (experts, out_features, in_features)
        return torch.bmm(grad_output, in_dtype(transposed, grad_output.dtype))

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        wide = selected.element_size() == 2 and dtype == torch.float32 and selected.device.type == "cuda"
        options: Any = {"out_dtype": dtype} if wide else {}  # no such kernel elsewhere in torch 2.13
        product = torch.bmm(selected.mT, grad_output, **options)  # (experts, r, out_features)
        gradient = torch.empty(size, dtype=dtype, device=product.device)
        gradient.mT.copy_(product)
        return scaled(gradient, scale)

"""A stack of experts' weights as the model's own code sees it while its columns are trained.

The forward of transformers' experts is left as it is, in each of its implementations: it takes one expert's weight, or
all of them for a grouped matmul, or one per routed token, and multiplies. `StackView` answers those few operations
with products that send gradients to the columns; anything else it refuses, since plain autograd would lose them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (defines torch.ops.transformers.grouped_mm_fallback)
from torch import Tensor

from paca.columns.resident import WRITING
from paca.columns.state import State
from paca.functional.grouped import BatchedProduct, GroupedMatmul, GroupedProduct
from paca.functional.linear import LinearProduct
from paca.functional.product import Product, Trained
from paca.functional.train_columns import train_columns
from paca.layers.mixed_batch import after_steps
from paca.layers.resident_weight import ResidentPass, ResidentWeight


class ExpertPass(ResidentPass):
    """A pass on one expert's weight. Taken from the stack anew in the backward pass: the stack may have moved."""

    def __init__(self, stack: ResidentWeight, state: State, expert: int) -> None:
        super().__init__(stack, state)
        self.expert = expert

    def weight(self) -> Tensor:
        return self.module.weight.select(0, self.expert)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class StackView:
    """The stack, or the part of it that was indexed, with the columns that one forward pass uses."""

    stack: Any  # a `ResidentStack`
    trained: Trained
    """The columns that gradients go to."""
    state: State
    """What the weight holds now; a backward pass puts it back if need be."""
    index: int | Tensor | None = None
    """None for the whole stack, a number for one expert, `(rows,)` int64 for one expert per row."""
    flipped: bool = False
    """Whether the last two dimensions are swapped against how the stack is stored."""

    # -- what the model's code asks of a weight -------------------------------------------------------------------

    def __getitem__(self, index: Any) -> StackView:
        if self.index is not None or self.flipped:
            raise ValueError(_refusal(f"indexing of {self!r}"))
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            return replace(self, index=int(index))
        if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32):
            return replace(self, index=index)
        raise ValueError(_refusal(f"indexing with {index!r}"))

    def transpose(self, first: int, second: int) -> StackView:
        dims = len(self.shape)
        if {first % dims, second % dims} != {dims - 2, dims - 1}:
            raise ValueError(_refusal(f"transpose({first}, {second})"))
        return replace(self, flipped=not self.flipped)

    @property
    def mT(self) -> StackView:
        return self.transpose(-2, -1)

    @property
    def shape(self) -> torch.Size:
        stored = self.stack.weight.shape
        experts: tuple[int, ...] = (stored[0],)
        if self.index is not None:
            experts = () if isinstance(self.index, int) else (self.index.shape[0],)
        return torch.Size((*experts, stored[2], stored[1]) if self.flipped else (*experts, stored[1], stored[2]))

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "data_ptr"):
            return getattr(self.stack.weight, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __repr__(self) -> str:
        return f"StackView{tuple(self.shape)}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = _PRODUCTS.get(func)
        if product is None:
            raise ValueError(_refusal(getattr(func, "__name__", str(func))))
        return product(*args, **(kwargs or {}))

    # -- the products ---------------------------------------------------------------------------------------------

    @property
    def _out_by_in(self) -> bool:
        """Whether a matrix of this is `(out_features, in_features)`, and not the transpose."""
        return (self.stack.input_dim == -1) != self.flipped

    def _multiply(self, product: Callable[[StackView], Tensor]) -> Tensor:
        """`product` of this; once more if another thread wrote other columns meanwhile."""
        y, columns = product(self), self.stack.columns
        if columns.state is self.state and not columns.half_written:
            return y

        def again() -> Tensor:
            with WRITING:
                state = self.stack.state_now()
                return product(replace(self, state=state, trained=columns.trained(state, self.stack.owner())))

        return after_steps(again)

    @torch.compiler.disable
    def _one_expert(self, x: Tensor, expert: int, bias: Tensor | None = None) -> Tensor:
        """`x (..., in_features)` times one expert's weight."""

        def product(view: StackView) -> Tensor:
            deltas = tuple(cut[expert] for cut in view.stack.deltas_by_expert(view.trained.deltas, view.state))
            source = ExpertPass(view.stack, view.state, expert)
            trained = view.trained._replace(deltas=deltas)
            return train_columns(LinearProduct(view.stack.input_dim + 2), x, None, bias, trained, source)

        return self._multiply(product)

    @torch.compiler.disable
    def _expert_of_each_row(self, x: Tensor, experts: Tensor) -> Tensor:
        """Row `i` of `x (rows, in_features)` times the weight of `experts[i]`, without a copy of it per row."""
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.stack.weight.shape[0]).tolist()
        parts = x.index_select(0, order).split(counts)
        products = [self._one_expert(part, expert) for expert, part in enumerate(parts) if counts[expert]]
        if not products:
            return self._one_expert(x, 0)
        return torch.cat(products).index_select(0, order.argsort())

    @torch.compiler.disable
    def _grouped(self, x: Tensor, offsets: Tensor, matmul: GroupedMatmul) -> Tensor:
        return self._all_experts(x, GroupedProduct(self.stack.input_dim, offsets, matmul))

    @torch.compiler.disable
    def _batched(self, x: Tensor) -> Tensor:
        return self._all_experts(x, BatchedProduct(self.stack.input_dim))

    def _all_experts(self, x: Tensor, kind: Product) -> Tensor:
        return self._multiply(
            lambda view: train_columns(kind, x, None, None, view.trained, ResidentPass(view.stack, view.state))
        )


def _one(operation: str, out_by_in: bool, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    """One expert by `F.linear`, which takes its weight as `(out, in)`, or by `matmul`, which takes `(in, out)`."""
    if isinstance(weight, StackView) and isinstance(weight.index, int) and weight._out_by_in == out_by_in:
        return weight._one_expert(x, weight.index, bias)
    raise ValueError(_refusal(operation, x, weight))


def _bmm(first: Any, second: Any) -> Tensor:
    """One row per indexed expert: `(rows, 1, in) @ (rows, in, out)`, or `(rows, out, in) @ (rows, in, 1)`; or as many
    for each: `(experts, rows, in) @ (experts, in, out)`."""
    if isinstance(second, StackView):
        if second.index is None and not second._out_by_in:
            return second._batched(first)
        if isinstance(second.index, Tensor) and not second._out_by_in and first.shape[1] == 1:
            return second._expert_of_each_row(first[:, 0], second.index)[:, None]
    elif isinstance(first.index, Tensor) and first._out_by_in and second.shape[2] == 1:
        return first._expert_of_each_row(second[..., 0], first.index)[..., None]
    raise ValueError(_refusal("bmm", first, second))


def _grouped_mm(matmul: GroupedMatmul, x: Any, weight: Any, offs: Any = None, **settings: Any) -> Tensor:
    plain = isinstance(offs, Tensor) and all(value is None for value in settings.values())
    if plain and isinstance(weight, StackView) and weight.index is None and not weight._out_by_in:
        return weight._grouped(x, offs, matmul)
    raise ValueError(_refusal("grouped_mm", x, weight))


_FALLBACK = torch.ops.transformers.grouped_mm_fallback
_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: partial(_one, "linear", True),
    torch.matmul: partial(_one, "matmul", False),
    torch.Tensor.matmul: partial(_one, "matmul", False),
    torch.bmm: _bmm,
    torch._grouped_mm: partial(_grouped_mm, torch._grouped_mm),
    _FALLBACK: partial(_grouped_mm, _FALLBACK),
}


def _refusal(operation: str, *operands: Any) -> str:
    shapes = " and ".join(f"{type(o).__name__}{tuple(getattr(o, 'shape', ()))}" for o in operands)
    return (
        f"The experts' code uses an adapted stack of weights in {operation}{f' of {shapes}' if shapes else ''}, which "
        "PaCA can't train columns through. It can through the implementations 'grouped_mm', 'batched_mm' and 'eager' "
        "of transformers' experts: try model.set_experts_implementation('grouped_mm'), or leave the parameter out of "
        "target_parameters."
    )

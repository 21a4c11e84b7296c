"""Gradients of deltas that are products of two factors: those of the factors, made straight from activations.

A delta's own gradient would take a product of all its columns with all output features, and memory of its size, of
which an optimizer of factors keeps two small products. Here are only these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from paca.functional.linear import column_gradient
from paca.functional.train_columns import in_dtype

_ATEN = torch.ops.aten


class Factors(NamedTuple):
    """A delta is `scale * b @ a`, or that added to where it started."""

    a: Tensor
    """`(rank, r)`."""
    b: Tensor
    """`(out_features, rank)`."""
    scale: float

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> FactorGradient:
        """The gradients of both, as that of a delta of `size` and `dtype`; as `Product.delta_gradient`."""
        columns, rows = selected.reshape(-1, selected.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        both = scale * self.scale
        of_b = column_gradient(columns @ in_dtype(self.a, columns.dtype).t(), rows, both, self.b.dtype)
        of_a = column_gradient(columns, rows @ in_dtype(self.b, rows.dtype), both, self.a.dtype)
        return FactorGradient((size, dtype), of_a, of_b)


class FactorGradient(Tensor):
    """Stands for a delta's gradient: gradients of its factors, which add up, and are scaled and clipped, as LoRA's.

    The delta's own can't be had of them, so that what asks for its values is refused.
    """

    of_a: Tensor
    """`(rank, r)`."""
    of_b: Tensor
    """`(out_features, rank)`."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _by_factor: ClassVar[frozenset[Any]] = frozenset(
        {
            *(_ATEN.detach.default, _ATEN.clone.default, _ATEN.zero_.default),
            *(_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.mul.Tensor, _ATEN.mul_.Tensor, _ATEN.div_.Tensor),
        }
    )
    _of_lists: ClassVar[frozenset[Any]] = frozenset(
        {
            *(_ATEN._foreach_mul_.Tensor, _ATEN._foreach_mul_.Scalar, _ATEN._foreach_zero_.default),
            _ATEN._amp_foreach_non_finite_check_and_unscale_.default,
        }
    )

    @staticmethod
    def __new__(cls, like: tuple[Any, ...], of_a: Tensor, of_b: Tensor) -> FactorGradient:
        size, dtype = like
        made: Any = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=of_a.device)
        made.of_a, made.of_b = of_a, of_b
        return made

    def __init__(self, like: tuple[Any, ...], of_a: Tensor, of_b: Tensor) -> None:
        """Args:
        like: The delta's size and dtype.
        of_a: `(rank, r)`.
        of_b: `(out_features, rank)`.
        """

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FactorGradient(of_a={self.of_a!r}, of_b={self.of_b!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if func in cls._by_factor and isinstance(first, cls) and not any(map(_is_other, args[1:])):
            of_a = func(*[x.of_a if isinstance(x, cls) else x for x in args], **kwargs)
            of_b = func(*[x.of_b if isinstance(x, cls) else x for x in args], **kwargs)
            return first if of_a is first.of_a else cls((first.shape, first.dtype), of_a, of_b)
        if func is _ATEN.linalg_vector_norm.default:
            order = args[1] if len(args) > 1 else 2
            norms = [torch.linalg.vector_norm(part, order) for part in (first.of_a, first.of_b)]
            return torch.linalg.vector_norm(torch.stack(norms), order)
        if func is _ATEN._foreach_norm.Scalar:
            return [torch.linalg.vector_norm(x, *args[1:]) for x in first]
        if func in cls._of_lists:
            return func(stored(first), *args[1:], **kwargs)
        raise RuntimeError(
            f"{func} was asked of a delta's gradient, of which there are only those of its two factors, as the "
            "paca.FactoredAdamW that holds this delta steps those. Do without it, or train with another optimizer "
            "after that one is gone (del)."
        )


def stored(tensors: Iterable[Any]) -> list[Any]:
    """`tensors`, with both parts of each `FactorGradient` in its place: what is in memory of them."""
    return [part for x in tensors for part in ((x.of_a, x.of_b) if isinstance(x, FactorGradient) else (x,))]


def _is_other(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value, FactorGradient)

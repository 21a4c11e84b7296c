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
    parameter: Any
    """The delta. None of a gradient's factors, which would keep it, as it keeps its gradient."""
    owner: Any
    """Something of the optimizer that steps them, which no other has."""

    def delta_gradient(
        self, selected: Tensor, grad_output: Tensor, indices: Tensor, scale: Any, size: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """The gradients of both, as that of a delta of `size` and `dtype`; as `Product.delta_gradient`, whose own it is
        where something looks at it, or it is added to another."""
        columns, rows = selected.reshape(-1, selected.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        there, seen = self.parameter.grad, self.parameter._backward_hooks or torch.is_anomaly_enabled()
        if seen or not (there is None or isinstance(there, FactorGradient)):
            return column_gradient(columns, rows, scale, dtype)
        both = scale * self.scale
        of_b = column_gradient(columns @ in_dtype(self.a, columns.dtype).t(), rows, both, self.b.dtype)
        of_a = column_gradient(columns, rows @ in_dtype(self.b, rows.dtype), both, self.a.dtype)
        like = size, self.parameter.stride(), dtype  # of other strides autograd makes a copy
        return FactorGradient(like, self._replace(parameter=None), of_a, of_b)

    def follow(self, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The gradients of both, of their delta's; by products in `dtype`."""
        gradient = gradient.to(dtype).reshape(*self.b.shape[:-1], self.a.shape[-1])
        of_a, of_b = self.b.to(dtype).mT @ gradient, gradient @ self.a.to(dtype).mT
        return of_a.to(self.a.dtype).mul_(self.scale), of_b.to(self.b.dtype).mul_(self.scale)


class FactorGradient(Tensor):
    """Stands for a delta's gradient: gradients of its factors, which add up, and are scaled and clipped, as LoRA's.

    The delta's own can't be had of them, so that what asks for its values is refused.
    """

    factors: Factors
    """Whose gradients these are."""
    of_a: Tensor
    """`(rank, r)`."""
    of_b: Tensor
    """`(out_features, rank)`."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _sums: ClassVar[frozenset[Any]] = frozenset({_ATEN.add.Tensor, _ATEN.add_.Tensor, _ATEN.copy_.default})
    _by_factor: ClassVar[frozenset[Any]] = frozenset(
        {
            *(_ATEN.detach.default, _ATEN.clone.default, _ATEN.zero_.default, _ATEN.clamp_.default),
            *(_ATEN.mul.Tensor, _ATEN.mul_.Tensor, _ATEN.div.Tensor, _ATEN.div_.Tensor),
        }
    )
    _of_lists: ClassVar[frozenset[Any]] = frozenset(
        {
            *(_ATEN._foreach_mul_.Tensor, _ATEN._foreach_mul_.Scalar, _ATEN._foreach_zero_.default),
            *(_ATEN._foreach_clamp_min_.Scalar, _ATEN._foreach_clamp_max_.Scalar),
            _ATEN._amp_foreach_non_finite_check_and_unscale_.default,
        }
    )

    @staticmethod
    def __new__(cls, like: tuple[Any, ...], factors: Factors, of_a: Tensor, of_b: Tensor) -> FactorGradient:
        size, strides, dtype = like
        made: Any = Tensor._make_wrapper_subclass(cls, size, strides, dtype=dtype, device=of_a.device)
        made.factors, made.of_a, made.of_b = factors, of_a, of_b
        return made

    def __init__(self, like: tuple[Any, ...], factors: Factors, of_a: Tensor, of_b: Tensor) -> None:
        """Args:
        like: The delta's size, strides and dtype.
        factors: Whose gradients these are.
        of_a: `(rank, r)`.
        of_b: `(out_features, rank)`.
        """

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FactorGradient(of_a={self.of_a!r}, of_b={self.of_b!r})"

    def data_ptr(self) -> int:
        """Refused: there is no memory of a delta's gradient, and kernels would be told that it is at 0."""
        raise _refused("data_ptr")

    def share_memory_(self) -> FactorGradient:
        """As any tensor's."""
        for part in (self.of_a, self.of_b):
            part.share_memory_()
        return self

    def made_of(self, of_a: Tensor, of_b: Tensor, dtype: torch.dtype | None = None) -> FactorGradient:
        """One of these parts: itself if they are its own, else as it is, or of `dtype`."""
        like = self.shape, self.stride(), dtype or self.dtype
        return self if of_a is self.of_a else FactorGradient(like, self.factors, of_a, of_b)

    def check_of(self, owner: Any, of_a: Tensor | None) -> None:
        """Raise `RuntimeError` if it is not of factors of this owner, or of another rank."""
        if self.factors.owner is not owner or (of_a is not None and of_a.shape != self.of_a.shape):
            raise RuntimeError(
                "A delta's gradient was made for other factors than are stepped now: another paca.FactoredAdamW's, or "
                "of another rank than was loaded. Set gradients to None (optimizer.zero_grad()), and make them anew."
            )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _ATEN.add.Tensor and not isinstance(args[0], cls) and not kwargs:
            args = args[::-1]
        kwargs, first = kwargs or {}, args[0]
        if func in cls._sums and isinstance(first, cls) and isinstance(args[1], Tensor) and args[1].dim():
            other = args[1]
            if isinstance(other, cls):
                other.check_of(first.factors.owner, first.of_a)
            of_a, of_b = (
                (other.of_a, other.of_b) if isinstance(other, cls) else first.factors.follow(other, first.of_a.dtype)
            )
            return first.made_of(func(first.of_a, of_a, **kwargs), func(first.of_b, of_b, **kwargs))
        if func in cls._by_factor and isinstance(first, cls) and not any(map(_is_large, args[1:])):
            return first.made_of(func(first.of_a, *args[1:], **kwargs), func(first.of_b, *args[1:], **kwargs))
        if func is _ATEN.new_empty_strided.default and args[1] == list(first.shape):  # autograd, before it copies
            return first.made_of(torch.empty_like(first.of_a), torch.empty_like(first.of_b))
        if func is _ATEN._to_copy.default:  # the parts keep their dtype
            parts = [part.to(kwargs.get("device") or part.device, copy=True) for part in (first.of_a, first.of_b)]
            return first.made_of(*parts, dtype=kwargs.get("dtype"))
        order = args[1] if len(args) == 2 else 2
        if func is _ATEN.linalg_vector_norm.default and len(args) < 3 and order != 0:
            norms = [torch.linalg.vector_norm(part, order, **kwargs) for part in (first.of_a, first.of_b)]
            return torch.linalg.vector_norm(torch.stack(norms), order)
        if func is _ATEN._foreach_norm.Scalar and len(args) < 3:
            return [torch.linalg.vector_norm(x, order, **kwargs) for x in first]
        if func in cls._of_lists:
            return func(stored(first), *args[1:], **kwargs)
        raise _refused(str(func))


def stored(tensors: Iterable[Any]) -> list[Any]:
    """`tensors`, with both parts of each `FactorGradient` in its place: what is in memory of them."""
    return [part for x in tensors for part in ((x.of_a, x.of_b) if isinstance(x, FactorGradient) else (x,))]


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _refused(asked: str) -> RuntimeError:
    return RuntimeError(
        f"{asked} was asked of a delta's gradient, of which there are only those of its two factors, as the "
        "paca.FactoredAdamW that holds this delta steps those. Do without it, hook the delta (register_hook), for "
        "which its own is made, or train with another optimizer after that one is gone (del, gc.collect())."
    )

"""An adapted convolution or embedding as ``torch.compile`` sees it: two opaque operators.

The same idea as ``compiled`` has for linear layers, for any layer that knows how to run itself and to compute its
gradients from what it kept (``OpaqueWeight``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.columns.state import Columns
from paca.layers.compiled import MIXED, OPERATOR_TAGS, check_not_mixed, make_fresh, module_of
from paca.layers.mixed_batch import current_mixed_batch
from paca.layers.resident_weight import ResidentWeight

_library = torch.library.Library("paca", "FRAGMENT")
_library.define(
    "weight_forward(Tensor x, Tensor handle, SymInt[] output_size, ScalarType dtype) -> (Tensor, Tensor)",
    tags=OPERATOR_TAGS,
)
_library.define(
    "weight_backward(Tensor grad_output, Tensor handle, Tensor tag, Tensor[] kept, int[] which, int[] sizes, "
    "SymInt[] input_size, bool need_x) -> Tensor[]",
    tags=OPERATOR_TAGS,
)


class OpaqueWeight(ResidentWeight):
    """A resident weight that knows how to run within a compiled graph."""

    channel_dim: int
    """The dimension of the output that a bias is added along, counted from the end."""

    # Called while the graph is traced, so they may look at shapes and settings, not at the weight's values.

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the output for ``x``."""
        raise NotImplementedError

    def output_size(self, x: Tensor) -> list[int]:
        """The size of the output for ``x``."""
        raise NotImplementedError

    def keep(self, x: Tensor, indices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What the gradients of the deltas of these columns need of ``x``."""
        raise NotImplementedError

    # Called at run time, by the operators.

    def run_plain(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the stock module computes, in ``dtype``, from the weight as it is."""
        raise NotImplementedError

    def input_gradient(self, grad_output: Tensor, input_size: Sequence[int]) -> Tensor:
        """The gradient of the input, in ``grad_output``'s dtype."""
        raise NotImplementedError

    def column_gradients(
        self, grad_output: Tensor, kept: Sequence[Tensor], columns: Sequence[Columns], dtype: torch.dtype
    ) -> list[Tensor]:
        """The gradients of these columns' deltas, in ``dtype``, from what ``keep`` gave."""
        raise NotImplementedError

    def _run_compiled(self, x: Tensor) -> Tensor:
        dtype, output_size = self.compute_dtype(x), tuple(self.output_size(x))
        if not torch.is_grad_enabled():
            return torch.ops.paca.weight_forward(x, self.handle, output_size, dtype)[0]
        inputs = self.resident.graph_inputs
        indices, deltas = inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
        which = tuple(n for n, delta in enumerate(deltas) if delta.requires_grad)
        kept = self.keep(x.detach(), [indices[n] for n in which], dtype)
        sizes = tuple((tuple(deltas[n].shape), deltas[n].dtype) for n in which)
        return _CompiledWeight.apply(
            x,
            self.bias,
            self.handle,
            output_size,
            dtype,
            self.channel_dim,
            which,
            sizes,
            len(kept),
            *kept,
            *(deltas[n] for n in which),
        )


class _CompiledWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        handle: Tensor,
        output_size: tuple[int, ...],
        dtype: torch.dtype,
        channel_dim: int,
        which: tuple[int, ...],
        sizes: tuple[tuple[tuple[int, ...], torch.dtype], ...],
        kept_count: int,
        *kept_then_deltas: Tensor,
    ) -> Tensor:
        y, tag = torch.ops.paca.weight_forward(x, handle, output_size, dtype)
        ctx.save_for_backward(handle, tag, *kept_then_deltas[:kept_count])
        ctx.which, ctx.sizes, ctx.channel_dim = which, sizes, channel_dim
        ctx.input_size, ctx.input_dtype = tuple(x.shape), x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        handle, tag, *kept = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_x, *grad_deltas = torch.ops.paca.weight_backward(
            grad_output,
            handle,
            tag,
            kept,
            ctx.which,
            [n for size, _ in ctx.sizes for n in size],
            ctx.input_size,
            need_x,
        )
        grad_bias = None
        if need_bias:
            channels = grad_output.movedim(ctx.channel_dim, -1)
            grad_bias = channels.reshape(-1, channels.shape[-1]).sum(0)
        return (
            grad_x.to(ctx.input_dtype) if need_x else None,
            grad_bias,
            *([None] * (7 + len(kept))),
            *(g.to(dtype) for g, (_, dtype) in zip(grad_deltas, ctx.sizes, strict=True)),
        )


def _forward(x: Tensor, handle: Tensor, output_size: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    module = module_of(handle)
    assert isinstance(module, OpaqueWeight)
    resident = module.resident
    owner = module.owner()
    make_fresh(module, owner)
    resident.note_forward()
    y = module.run_plain(x, dtype)
    batch = current_mixed_batch()
    if batch is not None and owner is not None:
        with torch.no_grad():
            mixed = owner.add_mixed_batch(y.contiguous(), x, batch)
        return mixed, torch.tensor(MIXED, dtype=torch.int64, device="cpu")
    resident.remember(resident.state)
    return y.contiguous(), resident.state.tag_tensor.clone()


def _backward(
    grad_output: Tensor,
    handle: Tensor,
    tag: Tensor,
    kept: list[Tensor],
    which: list[int],
    sizes: list[int],
    input_size: list[int],
    need_x: bool,
) -> list[Tensor]:
    module = module_of(handle)
    assert isinstance(module, OpaqueWeight)
    check_not_mixed(tag)
    state = module.resident.remembered(int(tag))
    module.resident.before_backward(module.weight, state, int(tag))
    grad_x = module.input_gradient(grad_output, input_size).contiguous() if need_x else grad_output.new_empty(0)
    columns = [state.columns[n] for n in which]
    gradients = module.column_gradients(grad_output, kept, columns, _gradient_dtype(grad_output))
    return [grad_x, *(g.contiguous() for g in gradients)]


def _gradient_dtype(grad_output: Tensor) -> torch.dtype:
    return torch.promote_types(grad_output.dtype, torch.float32)


_library.impl("weight_forward", _forward, "CompositeExplicitAutograd")
_library.impl("weight_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("paca::weight_forward")
def _(x: Tensor, handle: Tensor, output_size: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(output_size, dtype=dtype), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("paca::weight_backward")
def _(
    grad_output: Tensor,
    handle: Tensor,
    tag: Tensor,
    kept: list[Tensor],
    which: list[int],
    sizes: list[int],
    input_size: list[int],
    need_x: bool,
) -> list[Tensor]:
    wide = _gradient_dtype(grad_output)
    grad_x = grad_output.new_empty(input_size) if need_x else grad_output.new_empty(0)
    rank = len(sizes) // max(len(which), 1)  # of each delta, their sizes one after another
    return [
        grad_x,
        *(grad_output.new_empty(sizes[n * rank : (n + 1) * rank], dtype=wide) for n in range(len(which))),
    ]

"""An adapted layer as ``torch.compile`` sees it: two opaque operators.

A compiled graph can't ask whether the columns are fresh, nor put others back before its backward pass. These
operators do, at run time, with the code of the eager layer; so every invariant holds in compiled models as well,
without a graph break, and switching between adapters of one rank recompiles nothing. The weight is reached through
a handle: as an input of the graph it would be functionalized (copied) or version-checked.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paca.functional.column_blocks import take_columns
from paca.functional.linear import column_gradient, input_gradient, plain_linear
from paca.layers.mixed_batch import current_mixed_batch

if TYPE_CHECKING:
    from paca.layers.base import PacaLayer
    from paca.layers.resident_weight import ResidentWeight

_MODULES: weakref.WeakValueDictionary[int, ResidentWeight] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_JOINT_REFRESH: weakref.WeakKeyDictionary[PacaLayer, weakref.WeakMethod[Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)
MIXED = -1
"""The tag of a mixed batch; no state has it, since no hash is -1."""

# Replaying a CUDA graph would skip the Python in here, so these operators stay outside such graphs.
OPERATOR_TAGS = (
    torch.Tag.needs_fixed_stride_order,
    *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []),
)

_library = torch.library.Library("paca", "DEF")
_library.define(
    "linear_forward(Tensor x, Tensor handle, SymInt out_features, int[] which, SymInt[] ranks) "
    "-> (Tensor, Tensor, Tensor[])",
    tags=OPERATOR_TAGS,
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor handle, Tensor tag, Tensor[] selected, int[] which, "
    "SymInt in_features, bool need_x) -> Tensor[]",
    tags=OPERATOR_TAGS,
)


def new_handle(module: ResidentWeight) -> Tensor:
    """A scalar by which the operators find ``module`` while it lives."""
    number = next(_NUMBERS)
    _MODULES[number] = module
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def module_of(handle: Tensor) -> ResidentWeight:
    """The module that ``new_handle`` gave this scalar.

    Raises:
        RuntimeError: if its adapters were unloaded since.
    """
    module = _MODULES.get(int(handle))
    if module is None or "resident" not in vars(module):
        raise RuntimeError(
            "The adapters of a compiled model were unloaded between its forward and backward pass. Run backward() "
            "first, and compile the model that unload() gives back anew."
        )
    return module


def refresh_jointly(layers: Iterable[PacaLayer], refresh: Callable[[], None]) -> None:
    """Let whichever of ``layers`` is the first to run stale in a compiled graph call ``refresh``, a method that is held
    weakly, for all of them."""
    for layer in layers:
        _JOINT_REFRESH[layer] = weakref.WeakMethod(refresh)


def make_fresh(module: ResidentWeight, owner: PacaLayer | None) -> None:
    """Make the weight of ``module`` hold what the next forward pass has to see, and those of its model's other layers
    with it: what has to be computed for all of them is computed at once."""
    resident = module.resident
    if owner is not None:
        owner.push_columns()  # a scale may have been set by hand
    if not resident.stale(module.weight):
        return
    found = _JOINT_REFRESH.get(owner) if owner is not None else None
    refresh = None if found is None else found()
    if refresh is not None and torch._C._current_graph_task_id() == -1:  # a backward pass needs no other layer's
        refresh()
    if resident.stale(module.weight):
        resident.refresh(module.weight)


def check_not_mixed(tag: Tensor) -> None:
    """Raise in the backward pass of a mixed batch, from the tag of its forward pass."""
    if int(tag) == MIXED:
        raise RuntimeError(
            "A compiled model can't train on a mixed batch (adapter_names). Call the model that is not compiled, or "
            "run mixed batches under torch.no_grad()."
        )


def compiled_linear(module: ResidentWeight, x: Tensor) -> Tensor:
    """Run ``module`` on ``x (..., in_features)`` within a graph that is being compiled."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (x.dtype, module.weight.dtype):
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != module.weight.dtype:
        raise RuntimeError(f"the input is {x.dtype}, but the layer's weight is {module.weight.dtype}")
    out_features = module.weight.shape[1 - module.input_dim]
    if not torch.is_grad_enabled():
        return torch.ops.paca.linear_forward(x, module.handle, out_features, [], [])[0]
    inputs = module.resident.graph_inputs
    return _CompiledLinear.apply(x, module.bias, module.handle, out_features, *inputs[len(inputs) // 2 :])


class _CompiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        handle: Tensor,
        out_features: int,
        *deltas: Tensor,
    ) -> Tensor:
        which = [n for n in range(len(deltas)) if ctx.needs_input_grad[4 + n]]
        ranks = [deltas[n].shape[1] for n in which]
        y, tag, selected = torch.ops.paca.linear_forward(x, handle, out_features, which, ranks)
        ctx.save_for_backward(handle, tag, *selected)
        ctx.which, ctx.count, ctx.in_features = which, len(deltas), x.shape[-1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        handle, tag, *selected = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_x, *grad_deltas = torch.ops.paca.linear_backward(
            grad_output, handle, tag, selected, ctx.which, ctx.in_features, need_x
        )
        given = dict(zip(ctx.which, grad_deltas, strict=True))
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0) if need_bias else None
        return grad_x if need_x else None, grad_bias, None, None, *(given.get(n) for n in range(ctx.count))


def _forward(
    x: Tensor, handle: Tensor, out_features: int, which: list[int], ranks: list[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    module = module_of(handle)
    resident = module.resident
    owner = module.owner()
    make_fresh(module, owner)
    resident.note_forward()
    state = resident.state
    batch = None if owner is None else current_mixed_batch()
    if batch is None:  # gathered here: the compiler would do it in the backward pass, and compute x again for it
        selected = [take_columns(x, state.indices[n], state.runs[n]) for n in which]
    bias = None if module.bias is None else module.bias.to(x.dtype)
    y = plain_linear(x, module.weight.to(x.dtype), bias, module.input_dim)
    if batch is not None:
        with torch.no_grad():
            mixed = owner.add_mixed_batch(y.contiguous(), x, batch)
        unused = [x.new_empty((*x.shape[:-1], rank)) for rank in ranks]  # a backward pass raises
        return mixed, torch.tensor(MIXED, dtype=torch.int64, device="cpu"), unused
    resident.remember(state)
    return y.contiguous(), state.tag_tensor.clone(), selected


def _backward(
    grad_output: Tensor,
    handle: Tensor,
    tag: Tensor,
    selected: list[Tensor],
    which: list[int],
    in_features: int,
    need_x: bool,
) -> list[Tensor]:
    module = module_of(handle)
    check_not_mixed(tag)
    state = module.resident.remembered(int(tag))
    module.resident.before_backward(module.weight, state, int(tag))
    gradients = [
        input_gradient(grad_output, module.weight, module.input_dim).contiguous()
        if need_x
        else grad_output.new_empty(0)
    ]
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    for number, chosen in zip(which, selected, strict=True):
        columns = state.columns[number]
        gradients.append(column_gradient(chosen, rows, columns.scale, columns.delta.dtype).contiguous())
    return gradients


_library.impl("linear_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("paca::linear_forward")
def _(
    x: Tensor, handle: Tensor, out_features: int, which: list[int], ranks: list[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        x.new_empty((*x.shape[:-1], out_features)),
        torch.empty((), dtype=torch.int64, device="cpu"),
        [x.new_empty((*x.shape[:-1], rank)) for rank in ranks],
    )


@torch.library.register_fake("paca::linear_backward")
def _(
    grad_output: Tensor,
    handle: Tensor,
    tag: Tensor,
    selected: list[Tensor],
    which: list[int],
    in_features: int,
    need_x: bool,
) -> list[Tensor]:
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    grad_x = grad_output.new_empty((*grad_output.shape[:-1], in_features)) if need_x else grad_output.new_empty(0)
    return [grad_x, *(grad_output.new_empty((grad_output.shape[-1], s.shape[-1]), dtype=wide) for s in selected)]

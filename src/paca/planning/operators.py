"""What one call of an operator asks of a device: operations, bytes, and whether anything is launched at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# torch's table of formulas has the kernels of CUDA only.
_COUNTED_AS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
GROUPED = "_grouped_mm"
"""The experts' product."""
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, GROUPED: 0}
"""Matrix products, and at which argument the first matrix stands."""
_LAUNCH_NOTHING = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "set_", "resize_")
_READ_ONLY_WHAT_THEY_TAKE = ("embedding", "gather", "index", "index_select")
_WRITE_ONLY_WHAT_THEY_GIVE = ("index_copy_", "index_add_")
_DO_NOT_READ_WHAT_THEY_WRITE = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
_ON_LISTS = ("_foreach", "_fused_a", "_fused_sgd")
_WAIT = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "_unique2")


@dataclass(frozen=True)
class Operator:
    """One call, as far as its time depends on it. Equal calls take the same time."""

    name: str
    phase: str
    """`"forward"`, `"backward"` or `"step"`."""
    flops: int
    bytes: int
    """Read and written."""
    product: tuple[int, int, int, int] | None
    """Of a matrix product: batch, rows, columns, and the length of the sum."""
    dtype: torch.dtype | None
    """Of what it works on."""
    launches: bool
    """Whether the device gets work; a view does not."""
    tensors: int
    """How many it makes or changes: more than one for those that work on a list."""

    @property
    def attention(self) -> bool:
        """Whether this is fused attention."""
        return "attention" in self.name

    @property
    def waits(self) -> bool:
        """Whether the host waits for the result before it goes on."""
        return self.name in _WAIT


def operator_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, phase: str) -> Operator:
    """What the call `func(*args, **kwargs)`, which gave `result`, asks of a device."""
    name = func._overloadpacket.__name__
    written = list(_written(func, args, kwargs))
    outputs = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
    works = bool(outputs or written) or name in _WAIT  # else it tells something about a dtype or a shape
    launches = works and not name.startswith(_LAUNCH_NOTHING) and not (_is_view(func) and not written)
    largest = max(outputs or written, key=Tensor.numel, default=None)
    return Operator(
        name,
        phase,
        flops_of(func, args, kwargs, result),
        _moved(name, args, kwargs, outputs, written) if launches else 0,
        _product(name, args, kwargs),
        _worked_in(name, args, largest),
        launches,
        max(1, len(written), len(outputs)) if name.startswith(_ON_LISTS) else 1,
    )


@functools.cache
def formula_of(operator: Any) -> Callable[..., int] | None:
    """What counts the operations of an ATen operator; None where they are 0."""
    packet = operator._overloadpacket
    if packet.__name__ == GROUPED:
        return _grouped_flops
    formula = flop_registry.get(_COUNTED_AS.get(packet, packet))
    if formula is None and packet.__name__.endswith("_"):
        formula = flop_registry.get(getattr(aten, packet.__name__[:-1], None))  # addmm_ counts as addmm
    return formula


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one call of an ATen operator, a multiplication and an addition counted as two.

    Matrix products, convolutions and fused attention are counted, causal attention as the half that has to be computed;
    everything else is 0.
    """
    formula = formula_of(operator)
    if formula is None:
        return 0
    operations = formula(*args, **kwargs, out_val=result)
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "is_causal":
            given = args[position] if position < len(args) else kwargs.get("is_causal", argument.default_value)
            return operations // 2 if given else operations
    return operations


def _grouped_flops(first: Tensor, second: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each row meets one expert's matrix, of those in `second`; or where there is none, rows add up to one."""
    each = 2 * first.shape[-2] * first.shape[-1] * second.shape[-1]
    return each * first.shape[0] if first.dim() == second.dim() == 3 else each


def _is_view(func: Any) -> bool:
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor))


def _moved(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], written: list[Tensor]
) -> int:
    if name in _WRITE_ONLY_WHAT_THEY_GIVE:
        return 2 * _touched(args[3])
    made = {id(tensor): tensor for tensor in (*written, *outputs)}.values()
    writes = sum(map(_touched, made))
    if name in _READ_ONLY_WHAT_THEY_TAKE:
        return 2 * writes
    unread = {id(tensor) for tensor in written} if name in _DO_NOT_READ_WHAT_THEY_WRITE else set()
    read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) not in unread}
    return writes + sum(map(_touched, read.values()))


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor that are there: what is repeated by a stride of 0 is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def _product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int, int] | None:
    if name not in _PRODUCTS:
        return None
    first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
    rows, columns, length = int(first.shape[-2]), int(second.shape[-1]), int(first.shape[-1])
    offsets = (*args[2:], kwargs.get("offs"))[0] if name == GROUPED else None
    if offsets is None:
        return int(first.shape[0]) if first.dim() == 3 else 1, rows, columns, length
    groups = int(offsets.numel())  # as if each got as many
    if second.dim() == 3:
        return groups, -(-rows // groups), columns, length
    return groups, rows, columns, -(-length // groups)


def _worked_in(name: str, args: tuple[Any, ...], largest: Tensor | None) -> torch.dtype | None:
    if name in _PRODUCTS:
        return args[_PRODUCTS[name]].dtype  # the result may be wider
    return None if largest is None else largest.dtype

"""Every storage that a computation on fake tensors holds, from its allocation to its end, and what it multiplies."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paca.functional.factored import stored
from paca.planning.operators import Operator, formula_of, operator_of
from paca.planning.quantized_layers import dequantized_bytes

_DEVICE = torch.ops.prim.device.default
"""How a fake tensor is asked where it is."""


@dataclass(eq=False)
class Allocation:
    """One storage."""

    bytes: int
    start: int
    """Number of the event at which it was allocated."""
    category: str
    end: int | None = None
    """Number of the event at which it was freed; None while it lives."""

    def lives_at(self, event: int) -> bool:
        return self.start <= event and (self.end is None or event < self.end)


class LiveMemory(TorchDispatchMode):
    """While active, follows all storages that operators make, and counts the operators and the bytes that unpacking
    quantized weights moves.

    A storage counts whole, and once, from the operator that made it until nothing refers to it any more: what a caching
    allocator's counter of allocated bytes would show. `region` is the category of new storages, `phase` the part of the
    step that operators belong to.

    Args:
        every_operator: Count all of them; else those alone that do arithmetic worth counting, which is faster.
    """

    def __init__(self, every_operator: bool = True) -> None:
        super().__init__()
        self.every_operator = every_operator
        self.operators: Counter[Operator] = Counter()
        self.dequantized = 0
        self.region = "temporaries"
        self.bytes = 0
        self._event = 0
        self._all: list[Allocation] = []
        self._live: dict[int, tuple[Allocation, weakref.ref[Any]]] = {}
        self.phase = "forward"
        self._window = ""
        self._peaks: dict[str, tuple[int, int]] = {"": (0, 0)}  # by window: bytes, and the event that began them

    @property
    def flops(self) -> int:
        """Floating-point operations so far."""
        return sum(operator.flops * count for operator, count in self.operators.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # more than half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace in ("aten", "bitsandbytes") and (self.every_operator or formula_of(func)):
            self.operators[operator_of(func, args, kwargs, result, self.phase)] += 1
        self.dequantized += dequantized_bytes(func, args, result)
        self.note(tree_leaves(result), self.region)
        return result

    def note(self, tensors: Iterable[Any], category: str) -> None:
        """Follow the storages of `tensors` that are not followed yet, as `category`."""
        for tensor in stored(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._live or storage.nbytes() == 0:
                continue
            self._event += 1
            allocation = Allocation(storage.nbytes(), self._event, category)
            self._all.append(allocation)
            self._live[storage._cdata] = (allocation, weakref.ref(storage, self._freeing(storage._cdata)))
            self.bytes += allocation.bytes
            if self.bytes > self._peaks[self._window][0]:
                self._peaks[self._window] = (self.bytes, self._event)

    def categorize(self, tensors: Iterable[Tensor], category: str) -> None:
        """Count the storages of `tensors` as `category`, from their allocation on."""
        for tensor in stored(tensors):
            if (allocation := self.allocation_of(tensor)) is not None:
                allocation.category = category

    def allocation_of(self, tensor: Tensor) -> Allocation | None:
        """The record of the tensor's storage, if it is followed."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[0]

    def begin_window(self, name: str) -> None:
        """From now on, peaks are those of the window `name`."""
        self._window = name
        self._peaks[name] = (self.bytes, self._event)

    def now(self) -> Counter[str]:
        """Bytes held at this moment, by category."""
        return self._composition(self._event)

    def peaks(self) -> dict[str, Counter[str]]:
        """For each window, bytes by category at the moment of its peak."""
        return {name: self._composition(event) for name, (_, event) in self._peaks.items() if name}

    def _composition(self, event: int) -> Counter[str]:
        held: Counter[str] = Counter()
        for allocation in self._all:
            if allocation.lives_at(event):
                held[allocation.category] += allocation.bytes
        return held

    def _freeing(self, key: int) -> Any:
        # Python objects of storages live as long as the storage, so their end is the storage's end.
        def freed(_: Any) -> None:
            allocation, _reference = self._live.pop(key)
            self._event += 1
            allocation.end = self._event
            self.bytes -= allocation.bytes

        return freed

"""The first door: after an optimizer's step, the columns of the deltas that it holds are written, all layers together.
The hook is torch's own, of every `torch.optim.Optimizer`: also fused, 8-bit, or stepping inside a backward pass."""

from __future__ import annotations

import threading
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paca.columns.not_whole import UNFIT, refuse_unfit
from paca.columns.raised_steps import forget_raised
from paca.columns.resident import WRITING, ResidentColumns, write_together
from paca.columns.state import AdapterColumns, is_sharded

Job = tuple[ResidentColumns, Tensor, tuple[AdapterColumns, ...]]
Held = tuple[weakref.ref[Any], str]  # whose delta it is: a layer's, and the adapter
# By the id of each: parameters that weak references point to can't be swapped (torch.__future__).
_DELTAS: weakref.WeakValueDictionary[int, Deltas] = weakref.WeakValueDictionary()
STEPPING: dict[int, tuple[list[Held], list[Held], int]] = {}  # by thread: `_held` by the one that steps there, its id


def others_step(layers: list[Any]) -> bool:
    """Whether another thread is in a step of these layers: then columns are left as they are, those of before it."""
    if not STEPPING:
        return False
    forget_raised(STEPPING)
    others = [held[0] + held[1] for thread, held in STEPPING.items() if thread != threading.get_ident()]
    return not {id(layer_of()) for held in others for layer_of, _ in held}.isdisjoint(map(id, layers))


def _held(optimizer: torch.optim.Optimizer) -> tuple[list[Held], list[Held]]:
    """The deltas that `optimizer` holds, with gradients and without. In the thread that trains: they stay meanwhile."""
    held: tuple[list[Held], list[Held]] = ([], [])
    for group in optimizer.param_groups:
        for parameter in cast("list[Tensor]", group["params"]):
            if (found := owner_of_delta(parameter)) is not None:
                held[parameter.grad is None].append(found)
    return held


def owner_of_delta(parameter: Tensor) -> Held | None:
    return None if (deltas := _DELTAS.get(id(parameter))) is None else deltas.owner_of(parameter)


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    others_step([])  # forgets a step of this thread that raised
    if f"{type(optimizer).__module__}.{type(optimizer).__name__}".startswith(UNFIT):
        refuse_unfit(optimizer)
    with WRITING:  # a write that another thread has begun reads deltas
        STEPPING.setdefault(threading.get_ident(), (*_held(optimizer), id(optimizer)))


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with WRITING:
        before, _, outermost = STEPPING.get(thread := threading.get_ident(), ([], [], 0))
        if outermost == id(optimizer):  # within its step others may make theirs
            del STEPPING[thread]
        jobs: dict[ResidentColumns, Job] = {}  # one per weight: the last of its adapters knows them all
        # Gradients may come within the step (closures), or go (zeroed by the optimizer itself).
        now, without = _held(optimizer)
        stepped = dict.fromkeys([*before, *now])
        for layer_of, adapter_name in stepped:
            if (layer := layer_of()) is not None and (job := layer.stepped(adapter_name)) is not None:
                jobs[job[0]] = job
        if jobs:
            write_together(jobs.values())
        # Most optimizers leave a parameter alone that has no gradient; those that estimate it themselves don't.
        for layer_of, adapter_name in without:
            if (layer_of, adapter_name) not in stepped and (layer := layer_of()) is not None:
                layer.doubted(adapter_name)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


class Deltas(nn.ParameterDict):
    """Parameters of a layer that learns of steps of optimizers that hold them; their shards, where FSDP2 gathers."""

    _layer: weakref.ref[Any]

    def belong_to(self, layer: Any) -> None:
        """Say whose deltas these are, an adapted layer's; also after they were moved or copied."""
        self.__dict__["_layer"] = weakref.ref(layer)
        for delta in self._parameters.values():
            self._register(delta)

    def _register(self, value: Any) -> None:
        if "_layer" in self.__dict__ and isinstance(value, nn.Parameter):
            _DELTAS[id(value)] = self

    def owner_of(self, parameter: Tensor) -> Held | None:
        """The layer and adapter if this is a delta, or what FSDP2 shards one as; None if it, or its layer, is gone."""
        for name, delta in self._parameters.items():
            if (parameter is delta or parameter is self.shard(name)) and self._layer() is not None:
                return self._layer, name
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_deleted", ()):
            return  # FSDP2 goes on putting it back
        if (now := self._parameters.get(name)) is not None and self.shard(name) is not None:
            value.requires_grad_(now.requires_grad)  # FSDP2 swaps them, and PEFT's calls reach the one in place
        if is_sharded(value):
            shards = self.__dict__.setdefault("_shards", {})
            if name not in shards or shards[name].device_mesh == value.device_mesh:  # else ShardedColumns.replaced
                shards[name] = value
        super().__setattr__(name, value)
        self._register(value)

    def __delattr__(self, name: str) -> None:
        if self.__dict__.get("_shards", {}).pop(name, None) is not None:
            self.__dict__.setdefault("_deleted", set()).add(name)
        if name in self._parameters or name in self.__dict__:  # neither, if Ctrl-C came while it was put in
            super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_layer"}

    def shard(self, name: str) -> Any:
        """The `DTensor` of which this process owns a part, or None if that parameter is not sharded."""
        return self.__dict__.get("_shards", {}).get(name)

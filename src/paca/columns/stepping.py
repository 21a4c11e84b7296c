"""The first door: after an optimizer's step, the columns of the deltas that it holds are written, all layers together.

The hook is torch's own for every `torch.optim.Optimizer`: it runs after fused and foreach steps, 8-bit optimizers,
Muon, Adafactor and whatever else is a subclass, also where a step runs inside of a backward pass.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paca.columns.place import is_sharded
from paca.columns.resident import ResidentColumns, write_together
from paca.columns.state import AdapterColumns

Job = tuple[ResidentColumns, Tensor, tuple[AdapterColumns, ...]]


class HasDeltas(Protocol):
    """An adapted layer."""

    def stepped(self, adapter_name: str) -> Job | None:
        """Note that an optimizer changed this adapter's delta.

        Returns:
            What has to be written now, for `write_together`; None if nothing has.
        """
        ...

    def doubted(self, adapter_name: str) -> None:
        """Note that an optimizer may have changed this adapter's delta."""
        ...


_LAYERS: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Any], str]] = {}  # by the id of a delta
_STEPPING: dict[int, list[tuple[weakref.ref[Any], str]]] = {}  # by thread: whose deltas an optimizer is writing
_WRAPPER = torch.optim.Optimizer.profile_hook_step.__code__  # wraps every optimizer's step


def register_delta(delta: Tensor, layer: HasDeltas, adapter_name: str) -> None:
    """Let optimizers that hold `delta` tell `layer` about their steps."""
    key = id(delta)
    _LAYERS[key] = (weakref.ref(delta, lambda _: _LAYERS.pop(key, None)), weakref.ref(layer), adapter_name)


def others_step() -> bool:
    """Whether another thread is in an optimizer's step: then columns are left as they are, those of before it."""
    if not _STEPPING:
        return False
    for thread in list(_STEPPING):
        if not _is_in_a_step(thread):  # it raised, so that its hook did not run
            for layer_of, adapter_name in _STEPPING.pop(thread, []):
                layer = layer_of()
                if layer is not None:
                    layer.doubted(adapter_name)
    return bool(_STEPPING.keys() - {threading.get_ident()})


def _is_in_a_step(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _WRAPPER.co_filename:
            return True
        frame = frame.f_back
    return False


def _held(optimizer: torch.optim.Optimizer, with_gradients: bool) -> list[tuple[weakref.ref[Any], str]]:
    """The layers and adapters whose deltas `optimizer` holds, and has gradients of or not.

    This is the thread that trains: nobody replaces gradients meanwhile.
    """
    held = []
    for group in optimizer.param_groups:
        for parameter in cast("list[Tensor]", group["params"]):
            found = _LAYERS.get(id(parameter))
            if found is not None and found[0]() is parameter and (parameter.grad is not None) == with_gradients:
                held.append(found[1:])
    return held


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    others_step()  # forgets a step of this thread that raised
    _STEPPING.setdefault(threading.get_ident(), _held(optimizer, True))


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    before = _STEPPING.pop(threading.get_ident(), [])
    jobs: dict[ResidentColumns, Job] = {}  # one per weight, also if several adapters are in it: the last knows them all
    # Gradients may come within the step (closures), or go (zeroed by the optimizer itself).
    stepped = dict.fromkeys([*before, *_held(optimizer, True)])
    for layer_of, adapter_name in stepped:
        layer = layer_of()
        job = None if layer is None else layer.stepped(adapter_name)
        if job is not None:
            jobs[job[0]] = job
    if jobs:
        write_together(jobs.values())
    # Most optimizers leave a parameter alone that has no gradient; those that estimate it themselves don't.
    for layer_of, adapter_name in _held(optimizer, False):
        layer = None if (layer_of, adapter_name) in stepped else layer_of()
        if layer is not None:
            layer.doubted(adapter_name)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


class Deltas(nn.ParameterDict):
    """A `ParameterDict` whose layer learns of the steps of optimizers that hold its parameters.

    It also knows the shards while FSDP2 has put gathered parameters in their place.
    """

    def belong_to(self, layer: HasDeltas) -> None:
        """Say whose deltas these are; also after they were moved or copied."""
        self.__dict__["_layer"] = weakref.ref(layer)
        for name, delta in self._parameters.items():
            if delta is not None:
                register_delta(delta, layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_deleted", ()):
            return  # FSDP2 goes on putting it back
        if is_sharded(value):
            shards = self.__dict__.setdefault("_shards", {})
            if name not in shards or shards[name].device_mesh == value.device_mesh:  # else ShardedWeight.replaced
                shards[name] = value
        super().__setattr__(name, value)
        layer = self.__dict__.get("_layer", lambda: None)()
        if layer is not None and isinstance(value, nn.Parameter):
            register_delta(value, layer, name)

    def __delattr__(self, name: str) -> None:
        if self.__dict__.get("_shards", {}).pop(name, None) is not None:
            self.__dict__.setdefault("_deleted", set()).add(name)
        super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_layer"}

    def shard(self, name: str) -> Any:
        """The `DTensor` of which this process owns a part, or None if that parameter is not sharded."""
        return self.__dict__.get("_shards", {}).get(name)

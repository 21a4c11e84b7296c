"""The deltas of a layer, by adapter: parameters that optimizers hold, and that FSDP2 may shard."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from paca.columns.place import is_sharded
from paca.columns.stepping import HasDeltas, register_delta


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

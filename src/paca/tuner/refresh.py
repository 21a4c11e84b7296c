"""Bringing the stale layers of a whole model up to date at once.

A layer that is called alone looks after itself. This is for the model: on an accelerator three or four small kernels
per layer cost more in launches than in work, so the arithmetic of all layers is done together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.joint_refresh import refresh_together
from paca.columns.resident import ResidentColumns
from paca.columns.sharded import check_deltas_whole, check_same_columns, check_whole, find_groups
from paca.layers import PacaLayer
from paca.layers.compiled import refresh_jointly
from paca.layers.mixed_batch import current_mixed_batch


def paca_layers(model: nn.Module) -> list[PacaLayer]:
    """The adapted layers of ``model``."""
    return [m for m in model.modules() if isinstance(m, PacaLayer)]


def refresh(model: nn.Module) -> None:
    """Write the deltas into the weights now, whatever their version counters say.

    Needed only after a delta was written through ``.data`` (or by a foreign kernel) with no backward pass before it:
    that is the one change that nobody can see.

    Args:
        model: the adapted model, or any module that holds adapted layers.
    """
    layers = [layer for layer in paca_layers(model) if layer.mode == "resident"]
    for layer in layers:
        layer.base_layer.resident.suspect = True
    refresh_layers(layers)


def refresh_layers(layers: list[PacaLayer]) -> None:
    """Refresh those of ``layers`` that are stale."""
    stale: dict[Any, list[tuple[ResidentColumns, Tensor]]] = defaultdict(list)
    in_mixed_batch = current_mixed_batch() is not None
    for layer in layers:
        if layer.mode != "resident" or (in_mixed_batch and layer.runs_adapters_in_turn):
            continue
        base = layer.base_layer
        if base.sharded is not None:
            base.sharded.check()
        else:
            check_whole(base.weight)
        layer.push_columns()
        if base.sharded is None:
            check_deltas_whole(base.resident.wanted)
        weight = base.home
        if base.resident.stale(weight):
            stale[weight.device, weight.dtype].append((base.resident, base.home_to_write()))
    for group in stale.values():
        refresh_together(group)


class RefreshBeforeForward:
    """A forward pre-hook on the adapted model that refreshes its layers together.

    Within a compiled graph it can't: there the first stale layer calls ``refresh`` at run time.
    """

    def __init__(self, layers: list[PacaLayer]) -> None:
        self.layers = layers
        self._sharded = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            sharded = [layer for layer in self.layers if layer.base_layer.sharded is not None]
            if sharded and not self._sharded:
                find_groups(module)
                indices = [i for layer in sharded for i in layer.paca_indices.values()]
                check_same_columns(indices, sharded[0].base_layer.sharded.rows.device)
            self._sharded = bool(sharded)
            self.refresh()

    def refresh(self) -> None:
        """Refresh the layers now."""
        refresh_layers(self.layers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        refresh_jointly(self.layers, self.refresh)  # a copied or unpickled model's own layers

    @staticmethod
    def remove(model: nn.Module) -> None:
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, RefreshBeforeForward):
                del model._forward_pre_hooks[key]

    @staticmethod
    def install(model: nn.Module) -> None:
        RefreshBeforeForward.remove(model)
        hook = RefreshBeforeForward(paca_layers(model))
        model.register_forward_pre_hook(hook, prepend=True)
        refresh_jointly(hook.layers, hook.refresh)

"""Bringing the stale layers of a whole model up to date at once.

A layer that is called alone looks after itself. This is for the model: on an accelerator three or four small kernels
per layer cost more in launches than in work, so the arithmetic of all layers is done together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from paca.joint_refresh import refresh_together
from paca.layers import PacaLayer
from paca.resident import ResidentColumns
from paca.sharded import check_whole


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


def refresh_layers(layers: list[PacaLayer], *, before_forward: bool = False) -> None:
    """Refresh those of ``layers`` that are stale (``before_forward``: see ``refresh_together``)."""
    stale: dict[Any, list[tuple[ResidentColumns, Tensor]]] = defaultdict(list)
    for layer in layers:
        if layer.mode != "resident":
            continue
        base = layer.base_layer
        if base.sharded is not None:
            base.sharded.check()
        else:
            check_whole(base.weight)
        layer.push_columns()
        weight = base.home
        if base.resident.stale(weight):
            later = before_forward and base.sharded is None  # what is sharded is gathered before its layer runs
            stale[later, weight.device, weight.dtype].append((base.resident, base.home_to_write()))
    for (later, *_), group in stale.items():
        refresh_together(group, before_forward=later)


class RefreshBeforeForward:
    """A forward pre-hook on the adapted model that refreshes its layers together."""

    def __init__(self, layers: list[PacaLayer]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # compiled layers look after themselves, at run time
            refresh_layers(self.layers, before_forward=True)

    @staticmethod
    def remove(model: nn.Module) -> None:
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, RefreshBeforeForward):
                del model._forward_pre_hooks[key]

    @staticmethod
    def install(model: nn.Module) -> None:
        RefreshBeforeForward.remove(model)
        model.register_forward_pre_hook(RefreshBeforeForward(paca_layers(model)), prepend=True)

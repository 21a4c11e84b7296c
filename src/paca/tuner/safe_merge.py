"""Merging with ``safe_merge``: all layers or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from paca.layers import PacaLayer


def check_deltas(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise ``ValueError`` naming the layer if a delta to be merged is not finite."""
    for name, layer in _adapted(model):
        for adapter in adapter_names or layer.active_adapters:
            if adapter in layer.paca_delta and not bool(layer.paca_delta[adapter].isfinite().all()):
                raise ValueError(
                    f"Adapter {adapter!r} holds NaN or Inf in {name}, so nothing was merged. The adapter is broken: "
                    "train it again with a smaller learning rate, or use an earlier checkpoint."
                )


def merge_all_or_none(model: nn.Module, adapter_names: list[str] | None, merge: Callable[[], None]) -> None:
    """Call ``merge``, which checks each layer's sum as it merges it, and take back what it did if one is not finite.

    Finite deltas can make a sum that is not: float16 ends at 65504.

    Raises:
        ValueError: from ``merge``, or from ``check_deltas``; what was merged before is merged as it was.
    """
    check_deltas(model, adapter_names)
    before = {name: list(layer.merged_adapters) for name, layer in _adapted(model)}
    try:
        merge()
    except ValueError:
        for name, layer in _adapted(model):
            if layer.merged_adapters != before[name]:
                layer.unmerge()
                if before[name]:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        layer.merge(adapter_names=before[name])
        raise


def _adapted(model: nn.Module) -> list[tuple[str, PacaLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PacaLayer)]

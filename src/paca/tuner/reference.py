"""The frozen twin "ref" that TRL gives a loaded adapter, to be the reference policy.

TRL (1.16: DPO, KTO, GRPO, RLOO) adds an adapter of that name with the trained one's config and then copies the
parameters whose name has ".default." in the middle. PaCA's end in it, and its columns are no parameters: left to
that, the reference would be another policy than the one that training starts from. So the copy is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paca.layers import PacaLayer

REFERENCE = "ref"


def copied_adapter(configs: Mapping[str, Any], adapter_name: str) -> str | None:
    """The adapter that the new `adapter_name` is to be a copy of, or None.

    Only an adapter of TRL's name, made with the very config object of another: nobody else's adapter starts as a copy.
    """
    if adapter_name != REFERENCE:
        return None
    config = configs[adapter_name]
    return next((name for name, other in configs.items() if name != adapter_name and other is config), None)


@torch.no_grad()
def copy_deltas(layers: list[PacaLayer], original: str) -> None:
    """Give the reference the values of `original`, whose columns it already has."""
    for layer in layers:
        if REFERENCE in layer.paca_delta:
            layer.paca_delta[REFERENCE].copy_(layer.paca_delta[original])
            if original in layer.folded:
                layer.folded[REFERENCE] = layer.folded[original]

"""The frozen twin "ref" that TRL gives a loaded adapter, to be the reference policy.

TRL (1.16: DPO, KTO, GRPO, RLOO) adds an adapter of that name with the trained one's config and then copies the
parameters whose name has ".default." in the middle. PaCA's end in it, and its columns are no parameters: left to
that, the reference would be another policy than the one that training starts from. So the copy is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paca.layers import PacaLayer

REFERENCE = "ref"


def _original(configs: Mapping[str, Any]) -> str | None:
    """The adapter that the new "ref" is to be a copy of: made with the very config object; nobody else's starts so."""
    return next((name for name, other in configs.items() if name != REFERENCE and other is configs[REFERENCE]), None)


def columns_of_original(configs: Mapping[str, Any], layer: PacaLayer) -> Tensor | None:
    """The columns that the reference has in `layer`, if it is a copy."""
    original = _original(configs)
    return layer.paca_indices[original].clone() if original in layer.paca_indices else None


@torch.no_grad()
def copy_original(configs: Mapping[str, Any], layers: list[PacaLayer]) -> None:
    """Give the reference, if it is a copy, the original's values; it has its columns already."""
    original: Any = _original(configs)
    for layer in layers:
        if REFERENCE in layer.paca_delta and original in layer.paca_delta:
            layer.paca_delta[REFERENCE].copy_(layer.paca_delta[original])
            if original in layer.folded:
                layer.folded[REFERENCE] = layer.folded[original]

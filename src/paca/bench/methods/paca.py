"""PaCA with the model's stock blocks."""

from __future__ import annotations

import peft
from torch import nn

import paca
from paca.bench.method import Adaptation, Method
from paca.bench.targets import narrow_ranks


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put PaCA into the targets."""
    config = paca.PacaConfig(
        r=adaptation.rank, target_modules=adaptation.targets, rank_pattern=narrow_ranks(model, adaptation)
    )
    return peft.get_peft_model(model, config)


METHOD = Method("paca", "PaCA, stock blocks", prepare)

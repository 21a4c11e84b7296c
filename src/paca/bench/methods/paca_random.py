"""PaCA with columns drawn one by one, as the paper and PEFT draw them, instead of in blocks of neighbours."""

from __future__ import annotations

import peft
from torch import nn

import paca
from paca.bench.method import Adaptation, Method
from paca.bench.targets import narrow_ranks


def prepare(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Put PaCA into the targets."""
    ranks = narrow_ranks(model, adaptation)
    config = paca.PacaConfig(
        r=adaptation.rank, target_modules=adaptation.targets, rank_pattern=ranks, selection="random"
    )
    return peft.get_peft_model(model, config)


METHOD = Method("paca-random", "PaCA, stock blocks, columns drawn one by one", prepare)

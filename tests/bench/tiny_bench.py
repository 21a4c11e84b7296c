"""The smallest Llama-shaped settings: width 192 (3 heads of 64), 2 blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from paca.bench.base_model import BaseModel, build_base_model
from paca.bench.methods import find_methods
from paca.bench.settings import BenchSettings, Point
from paca.bench.step import TrainingStep


def settings(**changes: Any) -> BenchSettings:
    tiny = {"model": "smollm2-135m", "layers": 2, "hidden": 192, "vocab": 50, "scope": "blocks", "seq": (16,)}
    return BenchSettings(**{**tiny, "device": "cpu", "rank": 4, **changes})


def prepared(base: BaseModel, method: str, rank: int = 4) -> nn.Module:
    (found,) = find_methods([method])
    return found.apply(base.copy_sharing_weights(), rank)


POINT = Point(1, 16)


def step(method: str, variant: str = "eager", **changes: Any) -> TrainingStep:
    wanted = settings(**changes)
    base = build_base_model(wanted)
    return TrainingStep(prepared(base, method, wanted.rank), base, wanted, POINT, variant)

"""The trainers that a run can be made with, by the name that `train.trainer` gives: one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.training.trainers.classification import Classification
from paca.training.trainers.dpo import Dpo
from paca.training.trainers.grpo import Grpo
from paca.training.trainers.image_classification import ImageClassification
from paca.training.trainers.kind import TrainerKind
from paca.training.trainers.reward import Reward
from paca.training.trainers.sft import Sft

TRAINERS: dict[str, TrainerKind] = {
    kind.name: kind for kind in (Sft(), Dpo(), Grpo(), Reward(), Classification(), ImageClassification())
}


def trainer_kind(settings: Mapping[str, Any]) -> TrainerKind:
    """The one that the section `train` names."""
    return TRAINERS[settings.get("trainer", "sft")]

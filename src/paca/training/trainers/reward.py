"""`train.trainer: reward`: a model with one output learns to score the chosen answer above the rejected one."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from paca.training.config.run_config import RunConfig
from paca.training.trainers.dpo import check_all_kept, with_pairs_sampled
from paca.training.trainers.kind import RunData, TrainerKind, read_texts
from paca.training.trainers.weighed_batches import WeighsBatches


class _RewardTrainer(WeighsBatches, RewardTrainer):  # type: ignore[misc]
    """TRL's `RewardTrainer`, whose means over held-out data are over examples."""


class Reward(TrainerKind):
    """TRL's `RewardTrainer`."""

    name = "reward"
    arguments = RewardConfig
    trainer = _RewardTrainer
    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    score = "accuracy"

    def read(self, config: RunConfig) -> RunData:
        """Pairs, as for DPO."""
        train, held_out, template = read_texts(config, "preferences")
        loss = "the score of chosen answers above that of rejected ones"
        return RunData(train, held_out, loss, template, labels=["reward"])

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """With a sample of the pairs as tokens."""
        return with_pairs_sampled(config, data, cuts=False)

    def check_prepared(self, config: RunConfig, trainer: RewardTrainer, data: RunData) -> tuple[int, int]:
        """No pair was dropped because it is longer than `train.max_length`."""
        return check_all_kept(config, trainer, data, "an answer with its prompt is longer than")

    def lengths(self, dataset: Dataset) -> list[int]:
        """Of each pair, the longer one."""
        return [
            max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in dataset.select_columns(["chosen_ids", "rejected_ids"])
        ]

"""`train.trainer: dpo`: a language model learns to prefer one answer to another.

The reference is the model with its adapter disabled; only where the model itself is trained, there is a second copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from paca.data.conversion import ORIGIN
from paca.data.formats import Example
from paca.data.sample import take_sample
from paca.data.tokens import Tokens, encode
from paca.messages.errors import PacaError
from paca.training.config.run_config import RunConfig
from paca.training.first_weights import unmoved
from paca.training.prompt_form import check_prompts_stay_open, tokenizer_of
from paca.training.trainers.kind import RunData, TrainerKind, read_texts
from paca.training.trainers.reference import load_reference, told_of_reference
from paca.training.trainers.weighed_batches import WeighsBatches


class _DpoTrainer(WeighsBatches, DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer`, whose means over held-out data are over examples.

    A batch that is trained on before the weights have moved has no accuracy: see `Dpo.scored_before`.
    """

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, which appends what it measures to lists whose means are logged."""
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training and unmoved(self.args, self.state):
            self._metrics["train"].pop(Dpo.score, None)
        return loss


class Dpo(TrainerKind):
    """TRL's `DPOTrainer`."""

    name = "dpo"
    arguments = DPOConfig
    own_keys: ClassVar[dict[str, Any]] = {"eos_token": str | None}
    trainer = _DpoTrainer
    learning_rate = 1e-5  # ten times TRL's, which is for training in full
    score: ClassVar[str] = "rewards/accuracies"
    scored_before = False  # the reference itself prefers neither: ties, of which TRL's accuracy counts none as right

    def read(self, config: RunConfig) -> RunData:
        """Pairs: `prompt`, `chosen` and `rejected`."""
        train, held_out, template = read_texts(config, "preferences")
        check_prompts_stay_open(config, train)
        return RunData(train, held_out, "chosen answers against rejected ones", template)

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """With a sample of the pairs as tokens."""
        return with_pairs_sampled(config, data)

    def lines(self, config: RunConfig) -> list[tuple[str, str]]:
        """What the model is compared with."""
        return told_of_reference(config)

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """With a copy of the model as the reference, where the model itself is trained."""
        if config.method == "full" and not config.train.get("precompute_ref_log_probs"):
            parts["ref_model"] = load_reference(config, parts["model"], parts["processing_class"])
        return super().make(config, adapter, data, **parts)

    def check_prepared(self, config: RunConfig, trainer: DPOTrainer, data: RunData) -> tuple[int, int]:
        """No pair was dropped because its prompt fills `train.max_length`, and once cut its answers are two."""
        dropped = check_all_kept(config, trainer, data, "the prompt alone fills")
        alike = _check_differ(config, trainer, data)
        return dropped[0] + alike[0], dropped[1] + alike[1]

    def lengths(self, dataset: Dataset) -> list[int]:
        """Of each pair, the longer one with its prompt."""
        return [
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        ]


def _check_differ(config: RunConfig, trainer: Any, data: RunData) -> tuple[int, int]:
    """Refuse a run with pairs whose answers are the same once they are cut, or leave them out: then count them.

    Raises:
        PacaError: Names the first of them.
    """
    limit, keep_end = trainer.args.max_length, trainer.args.truncation_mode == "keep_end"
    counts = []
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name)
        counts.append(0)
        if dataset is None:
            continue
        rows = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        alike = {number for number, row in enumerate(rows) if _same_once_cut(row, limit, keep_end)}
        if alike and (config.data.unusable != "leave_out" or len(alike) == len(dataset)):
            raise PacaError(
                f"{dataset[min(alike)][ORIGIN]}: chosen and rejected are the same once they are cut at "
                f"train.max_length = {limit}, so there is nothing to prefer in {len(alike):,} of {len(dataset):,} "
                f"pairs. {_raise_or_remove(limit, data.context)} data.unusable: leave_out does without, if others are "
                "left."
            )
        counts[-1] = len(alike)
        setattr(trainer, name, dataset.select([number for number in range(len(dataset)) if number not in alike]))
    return counts[0], counts[1]


def _same_once_cut(row: dict[str, list[int]], limit: int | None, keep_end: bool) -> bool:
    chosen, rejected = (row["prompt_ids"] + row[answer] for answer in ("chosen_ids", "rejected_ids"))
    kept = slice(None) if limit is None else slice(-limit, None) if keep_end else slice(limit)
    return chosen[kept] == rejected[kept]


def with_pairs_sampled(config: RunConfig, data: RunData, *, cuts: bool = True) -> RunData:
    """The data with a sample of its pairs as tokens; `cuts` as in `take_sample`."""
    tokenizer, settings = tokenizer_of(config), config.train

    def forms(example: Example) -> list[Tokens]:
        prompt = {name: example[name] for name in ("prompt", "tools") if example.get(name) is not None}
        name = "completion" if "prompt" in prompt else "messages"
        return [
            encode({**prompt, name: example[answer], ORIGIN: example[ORIGIN]}, tokenizer)
            for answer in ("chosen", "rejected")
        ]

    sample = take_sample(
        data.train,
        tokenizer,
        forms,
        limit=settings["max_length"],
        keep_end=settings.get("truncation_mode") == "keep_end",
        batch_size=settings["per_device_train_batch_size"],
        cuts=cuts,
    )
    return replace(data, sample=sample)


def check_all_kept(config: RunConfig, trainer: Any, data: RunData, why: str) -> tuple[int, int]:
    """Refuse a run for which TRL dropped examples, unless they are to be left out: then count them.

    Raises:
        PacaError: Names the first of them.
    """
    counts = []
    for kept, given in ((trainer.train_dataset, data.train), (trainer.eval_dataset, data.eval)):
        counts.append(0 if given is None else len(given.dataset) - len(kept))
        if given is None or not counts[-1] or (config.data.unusable == "leave_out" and len(kept)):
            continue
        there = set(kept[ORIGIN])
        lost = [origin for origin in given.dataset[ORIGIN] if origin not in there]
        limit = trainer.args.max_length
        raise PacaError(
            f"{lost[0]}: {why} train.max_length = {limit} tokens. {len(lost):,} of {len(given.dataset):,} pairs would "
            f"be left out so. {_raise_or_remove(limit, data.context)} data.unusable: leave_out does without."
        )
    return counts[0], counts[1]


def _raise_or_remove(limit: int, context: int | None) -> str:
    """How an advice for pairs that are cut too early begins: no length beyond the model's context."""
    if context is not None and limit >= context:
        return f"The model was made for {context:,} positions, so shorten or remove them;"
    return "Raise train.max_length, or remove them;"

"""`train.trainer: classification`: a model with a head for each label learns which label a text has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets import ClassLabel, Dataset
from peft import get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from paca.data import Examples
from paca.data.conversion import ORIGIN
from paca.data.formats import Example
from paca.data.labelled_texts import label_names
from paca.data.sample import take_sample
from paca.data.tokens import IGNORED, Tokens
from paca.messages.errors import PacaError
from paca.pretrained.quiet import without_progress_bars
from paca.training.config.run_config import RunConfig
from paca.training.named_model import in_models_order
from paca.training.prompt_form import tokenizer_of
from paca.training.trainers.kind import RunData, TrainerKind, datasets_of, read_split, reader


class _ClassifierTrainer(Trainer):
    """transformers' `Trainer`, with losses in float32, as `paca evaluate` has them, and means over accumulated batches.

    Models that take `num_items_in_batch` are to divide by it, and the classifiers of language models forget: their loss
    and gradients grew with `gradient_accumulation_steps`.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, or it and the outputs; smoothed ones are transformers' own."""
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.label_smoother is None and labels is not None:
            summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            found = cross_entropy(outputs.logits.float(), labels, reduction="sum" if summed else "mean")
            if summed:  # over all processes, whose gradients are averaged
                shared = self.args.average_tokens_across_devices
                found = found * (self.accelerator.num_processes if shared else 1) / num_items_in_batch
            loss = found
        return (loss, outputs) if return_outputs else loss


class Classification(TrainerKind):
    """transformers' `Trainer`."""

    name = "classification"
    arguments = TrainingArguments
    own_keys: ClassVar[dict[str, Any]] = {"max_length": int | None}
    trainer = _ClassifierTrainer
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    task_type: ClassVar[str | None] = "SEQ_CLS"
    renders = False
    measured = ("loss", "accuracy")
    score = "accuracy"

    def loader(self, config: RunConfig, *, held_out: bool = False) -> Callable[..., Examples]:
        """Records of `text` and `label`."""
        return reader(config, "labels", held_out=held_out)

    def read(self, config: RunConfig) -> RunData:
        """The labels are those of both sources, or of the one that is split."""
        train, held_out = read_split(config, self.loader)
        sources = [train] if held_out is None or isinstance(config.data.eval, str) else [train, held_out]
        names = label_names(label for source in sources for label in source.dataset["label"])
        return with_labels(train, held_out, in_models_order(names, config.model))

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """With a sample of the texts as tokens."""
        tokenizer, texts = tokenizer_of(config), data.train

        def forms(example: Example) -> list[Tokens]:
            ids = tokenizer(example["text"])["input_ids"]
            return [Tokens(ids, [IGNORED] * len(ids))]

        limit, batch = config.train["max_length"], config.train["per_device_train_batch_size"]
        sample = take_sample(texts, tokenizer, forms, limit=limit, batch_size=batch)
        assert data.labels is not None
        names, labels = data.labels, dict(zip(texts.dataset[ORIGIN], texts.dataset["labels"], strict=True))
        return replace(data, sample=sample.followed_by(lambda origin: [("\n→ ", False), (names[labels[origin]], True)]))

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """With the adapter in the model, and accuracy measured at each evaluation."""
        if adapter is not None:
            parts["model"] = get_peft_model(parts["model"], adapter)
        processor = parts["processing_class"]
        for name, dataset in datasets_of(data).items():
            parts[name] = None if dataset is None else self.encode(dataset, processor, config)
        measure = Accuracy()
        trainer = _ClassifierTrainer(data_collator=self.collator(processor), compute_metrics=measure, **parts)
        measure.step_now = lambda: trainer.state.global_step
        return trainer

    def encode(self, dataset: Dataset, processor: Any, config: RunConfig) -> Dataset:
        """The rows as the trainer takes them."""
        length = config.train["max_length"]

        def tokens(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return dict(processor(batch["text"], truncation=length is not None, max_length=length))

        with without_progress_bars(datasets):
            return dataset.map(
                tokens, batched=True, remove_columns=[name for name in dataset.column_names if name != "labels"]
            )

    def right(self, trainer: Trainer, step: int) -> str:
        measure = trainer.compute_metrics
        return measure.right if isinstance(measure, Accuracy) and measure.step == step and _in_order(trainer) else ""

    def evaluate_examples(self, trainer: Trainer, step: int) -> None:
        """The last evaluation was of other weights where an earlier checkpoint is the best; a run that was resumed
        after its last step made none."""
        measure, held_out = trainer.compute_metrics, trainer.eval_dataset
        if _in_order(trainer) and isinstance(measure, Accuracy) and measure.step != step:
            assert isinstance(held_out, Dataset)
            trainer.predict(held_out)  # which, unlike `evaluate`, adds no point to the curve
            measure.step = step

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of rows."""
        return DataCollatorWithPadding(processor)


def with_labels(train: Examples, held_out: Examples | None, names: list[str]) -> RunData:
    """The data of a classifier: its labels are numbers, which count `names`.

    Raises:
        PacaError: There are not two labels to tell apart, or an example has none of them.
    """
    if len(names) < 2:
        raise PacaError(f"{train.source} has one label, {names}; a classifier needs two or more to tell apart.")
    held_out = None if held_out is None else numbered(held_out, names)
    return RunData(numbered(train, names), held_out, f"the right one of {len(names)} labels", labels=names)


def numbered(examples: Examples, names: list[str]) -> Examples:
    """The same with the column `labels`, which counts `names`, in place of `label`.

    Raises:
        PacaError: An example has none of them.
    """
    dataset = examples.dataset
    feature, labels = dataset.features["label"], list(dataset["label"])
    if isinstance(feature, ClassLabel):
        labels = [feature.names[label] if label is not None and label >= 0 else None for label in labels]
    numbers = {name: number for number, name in enumerate(names)}
    for origin, label in zip(dataset[ORIGIN], labels, strict=True):
        if label not in numbers:
            raise PacaError(
                f"{origin}: its label is {label!r}, which is none of the training data's: {', '.join(names)}. Correct "
                "it, or leave the record out."
            )
    dataset = dataset.remove_columns("label").add_column("labels", [numbers[label] for label in labels])
    return replace(examples, dataset=dataset)


def _in_order(trainer: Trainer) -> bool:
    """Examples that are grouped by length are evaluated in an order of chance."""
    return bool(trainer.args.train_sampling_strategy != "group_by_length")


class Accuracy:
    """A trainer's `compute_metrics`."""

    right: str = ""
    """1 or 0 for each example, as it was evaluated last."""
    step: int | None = None
    """The trainer's step then; None before."""

    def __init__(self) -> None:
        self.step_now: Callable[[], int] = lambda: 0

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of examples whose label has the highest of the logits `(examples, labels)`; NaN where one of them
        is, as by weights that diverged: the highest would be the first label's."""
        logits: Any = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        right = logits.argmax(-1) == prediction.label_ids
        self.right, self.step = "".join("01"[int(one)] for one in right), self.step_now()
        return {"accuracy": float("nan") if np.isnan(logits).any() else float(np.mean(right))}

"""Which labels a classifier gives to texts or images, and how likely it finds the right ones."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from paca.data import Examples
from paca.data.conversion import ORIGIN
from paca.data.images import image_bytes
from paca.evaluation.batches import longest_first
from paca.evaluation.kept_lines import KeptAnswers
from paca.evaluation.own_data import SAMPLES, Score
from paca.lean.float32_products import fastest_products
from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel
from paca.training.config.run_config import RunConfig
from paca.training.trainers import trainer_kind
from paca.training.trainers.classification import Classification


class Asked(NamedTuple):
    """One example, as it is told from others."""

    row: int
    content: str
    """The text, or a hash of the image's file."""
    label: int


class Given(NamedTuple):
    """What a model says of it."""

    label: int
    loss: float
    """The negative log-probability of the right label, in nats."""


def measure_labels(
    loaded: LoadedModel,
    examples: Examples,
    config: RunConfig,
    batch_size: int = 8,
    kept: KeptAnswers | None = None,
) -> Score:
    """Score a classifier.

    Args:
        loaded: The classifier.
        examples: With the column `labels`, numbers of the model's outputs.
        config: Of its run.
        batch_size: Examples at a time.
        kept: Where its answers are kept, if anywhere.

    Returns:
        `accuracy`, a share, and `loss`, nats an example.

    Raises:
        PacaError: No examples, or one that can't be read.
    """
    kind, rows, model, processor = trainer_kind(config.train), examples.dataset, loaded.model, loaded.tokenizer
    assert isinstance(kind, Classification)
    if not len(rows):
        raise PacaError(f"{examples.source} has no examples to measure on.")
    encoded = kind.encode(rows, processor, config)
    collate = kind.collator(processor)

    @torch.no_grad()
    def classify(batch: list[Asked]) -> list[Given]:
        inputs = collate([encoded[one.row] for one in batch])
        inputs.pop("labels")
        tensors = {name: value.to(model.device) for name, value in inputs.items()}
        for name, value in tensors.items():
            tensors[name] = value.to(model.dtype) if value.is_floating_point() else value
        with fastest_products(model.device, model.dtype):
            logits = model(**tensors).logits.float().cpu()
        losses = cross_entropy(logits, torch.tensor([one.label for one in batch]), reduction="none")
        return [Given(*one) for one in zip(logits.argmax(-1).tolist(), losses.tolist(), strict=True)]

    asked = [Asked(index, _content(row), row["labels"]) for index, row in enumerate(rows)]
    found = [Given(*one) for one in longest_first(classify, asked, _length, batch_size, "examples labelled", kept)]
    right = [float(given.label == one.label) for given, one in zip(found, asked, strict=True)]
    names = model.config.id2label
    samples = [
        {"question": row.get("text", row[ORIGIN]), "reference": names[one.label], "answer": names[given.label]}
        for row, one, given in zip(rows.select(range(min(SAMPLES, len(rows)))), asked, found, strict=False)
    ]
    return Score({"accuracy": right, "loss": [given.loss for given in found]}, [1.0] * len(found), samples)


def _length(one: Asked) -> int:
    return len(one.content)


def _content(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    return hashlib.sha256(image_bytes(row)).hexdigest()

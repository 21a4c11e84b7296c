"""`train.trainer: image_classification`: a vision model learns which label an image has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, Trainer

from paca.data import Examples, load_images, open_image
from paca.data.evenly import spread_evenly
from paca.messages.errors import about
from paca.pretrained import load_image_processor
from paca.training.config.run_config import RunConfig
from paca.training.trainers.classification import Classification, with_labels
from paca.training.trainers.kind import RunData, read_split

_OPENED = 16
"""Images that are looked at before a run, spread evenly: a whole set may have millions."""


class ImageClassification(Classification):
    """transformers' `Trainer`."""

    name = "image_classification"
    own_keys: ClassVar[dict[str, Any]] = {}
    auto_class = AutoModelForImageClassification
    task_type = None
    counts = "images"

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Images are counted; their files are opened as they are needed, so that the rows must keep them."""
        return {"include_num_input_tokens_seen": "all", "remove_unused_columns": False}

    def loader(self, config: RunConfig, *, held_out: bool = False) -> Callable[..., Examples]:
        """Images, each with a label."""
        return partial(load_images, label=config.data.label)

    def read(self, config: RunConfig) -> RunData:
        """The labels are those of the training data."""
        train, held_out = read_split(config, self.loader)
        return with_labels(train, held_out, train.dataset.features["label"].names)

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """As it is, an image is no text to be shown; but some of them are opened, as the model will see them.

        Raises:
            PacaError: One of them can't be read, or the model has no image processor.
        """
        model = config.model
        with about("model.name"):
            processor = load_image_processor(model.name, model.revision, model.trust_remote_code)
        for part in (data.train, data.eval):
            for row in [] if part is None else spread_evenly(part.dataset, _OPENED):
                processor([open_image(row)], return_tensors="pt")
        return data

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """With the adapter in the model, and images counted by their labels."""
        parts["model"].main_input_name = "labels"
        return super().make(config, adapter, data, **parts)

    def encode(self, dataset: Dataset, processor: Any, config: RunConfig) -> Dataset:
        """As they are: a batch opens its images."""
        return dataset

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Opens images, and makes them what the model's own processor makes of them."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            pixels = processor([open_image(row) for row in rows], return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def lengths(self, dataset: Dataset) -> list[int]:
        """One each: all images become the same size."""
        return [1] * len(dataset)

"""`train.trainer: image_classification`: a vision model learns which label an image has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, PreTrainedModel, Trainer

from paca.data import Examples, load_images, open_image
from paca.data.conversion import ORIGIN
from paca.data.evenly import spread_evenly
from paca.data.images import image_bytes
from paca.messages.errors import PacaError, about
from paca.pretrained import load_image_processor
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import RunConfig
from paca.training.named_model import in_models_order
from paca.training.trainers.classification import Classification, with_labels
from paca.training.trainers.kind import RunData, read_split

_OPENED = 16
"""Images that are looked at in a dry run, spread evenly: a whole set may have millions."""
_OPENED_BYTES = 1 << 30
"""How much of the images' files is opened before a run."""


class ImageClassification(Classification):
    """transformers' `Trainer`."""

    name = "image_classification"
    own_keys: ClassVar[dict[str, Any]] = {}
    auto_class = AutoModelForImageClassification
    task_type = None
    counts = "images"

    def check(self, settings: Mapping[str, Any], origins: Origins) -> None:
        """Nothing is asked for that is of texts."""
        if settings.get("train_sampling_strategy") == "group_by_length":
            raise PacaError(
                f"{origins.of('train.train_sampling_strategy')}: train.train_sampling_strategy: group_by_length is for "
                "texts; images become the same size. Leave it out."
            )
        if settings.get("remove_unused_columns"):
            raise PacaError(
                f"{origins.of('train.remove_unused_columns')}: train.remove_unused_columns would remove the images, "
                "which are opened as they are needed. Leave it out."
            )

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Images are counted; their files are opened as they are needed, so that the rows must keep them."""
        return {"include_num_input_tokens_seen": "all", "remove_unused_columns": False}

    def loader(self, config: RunConfig, *, held_out: bool = False) -> Callable[..., Examples]:
        """Images, each with a label."""
        return partial(load_images, label=config.data.label)

    def read(self, config: RunConfig) -> RunData:
        """The labels are those of the training data, in the order of a model that knows them."""
        train, held_out = read_split(config, self.loader)
        names = in_models_order(train.dataset.features["label"].names, config.model)
        return with_labels(train, held_out, names)

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """As it is, an image is no text to be shown; but some of them are opened, as the model will see them.

        Raises:
            PacaError: One of them can't be read, they become different in size, or the model has no image processor.
        """
        model = config.model
        with about("model.name"):
            processor = load_image_processor(model.name, model.revision, model.trust_remote_code)
        rows = [row for part in (data.train, data.eval) if part for row in spread_evenly(part.dataset, _OPENED)]
        shapes: dict[tuple[int, ...], str] = {}
        for row in rows:
            pixels = processor([open_image(row)], return_tensors="pt")["pixel_values"]
            shapes.setdefault(tuple(pixels.shape[1:]), row[ORIGIN])
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise PacaError(
                f"The image processor of {model.name} makes images of several sizes: {_size(one)} of {first}, "
                f"{_size(other)} of {second}. A batch takes one. Give images of one shape, or set the size with both "
                "height and width, or a crop, in its preprocessor_config.json."
            )
        if whole:
            _open_all(data)
        return data

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """With the adapter in the model, and images counted by their labels."""
        model = parts["model"]
        model.main_input_name = "labels"
        model.register_forward_pre_hook(_in_the_weights_type, with_kwargs=True)
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


def _open_all(data: RunData) -> None:
    """Find damaged images before a run begins, which could not go on without them; as many as take no minutes."""
    opened = 0
    for part in (data.train, data.eval):
        for row in () if part is None else part.dataset:
            opened += len(image_bytes(row))
            if opened > _OPENED_BYTES:
                return
            open_image(row)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]} × {shape[-2]} pixels"


def _in_the_weights_type(
    model: PreTrainedModel, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pixels as the weights are: a processor makes float32, which convolutions in 16 bits refuse."""
    return args, {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}

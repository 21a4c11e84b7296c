"""What one pass of a model takes in, and its loss: language models, classifiers of texts and images, reward models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from paca.planning.setting import Setting
from paca.pretrained.image_shape import image_shape

Task = Literal["text", "labelled texts", "pairs", "images"]


def task_of(model: nn.Module) -> Task | None:
    """What a model is trained on; None for what no plan is made for. A text model with one output compares pairs."""
    if not isinstance(model, PreTrainedModel):
        return None
    name = type(model).__name__
    if name.endswith("ForImageClassification"):
        return "images"
    if name.endswith("ForSequenceClassification"):
        return "pairs" if model.config.num_labels == 1 else "labelled texts"
    return "text" if model.can_generate() else None


def inputs_of(model: PreTrainedModel, setting: Setting, batch_size: int, padded: bool) -> dict[str, Tensor]:
    """The arguments of a pass, as shapes: tokens `(sequences, length)`, or pixels `(images, channels, height, width)`.

    Args:
        model: It gets a padding token if it has none, as a run gives it its tokenizer's.
        setting: How it is trained.
        batch_size: Examples.
        padded: Whether attention gets a mask.
    """
    task = task_of(model)
    labels = {"labels": torch.zeros(batch_size, dtype=torch.int64)}
    if task == "images":
        return {"pixel_values": torch.zeros(batch_size, *image_shape(model.config)), **labels}
    rows = 2 * batch_size if task == "pairs" else batch_size  # the chosen answers, then the rejected ones
    tokens = torch.zeros(rows, setting.sequence_length, dtype=torch.int64)
    inputs = {"input_ids": tokens}
    if padded or task == "pairs":
        inputs["attention_mask"] = tokens.clone()
    if task == "text":
        return {**inputs, "labels": tokens.clone()}
    text = model.config.get_text_config()
    text.pad_token_id = text.pad_token_id or 0
    return inputs if task == "pairs" else inputs | labels


def loss_of(model: PreTrainedModel, inputs: dict[str, Tensor], chunked: bool) -> Tensor:
    """The loss of a pass. `chunked`: by TRL's output head, which a language model has then."""
    task = task_of(model)
    if task == "images":
        return model(**inputs).loss
    options: dict[str, Any] = {"fused_lm_head": True} if chunked else {}
    result = model(**inputs, use_cache=False, **options)
    if task != "pairs":
        return result.loss
    chosen, rejected = result.logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()  # as TRL's RewardTrainer

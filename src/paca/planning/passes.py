"""What one pass of a model takes in, and its loss: language models, classifiers of texts and images, reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from paca.planning.learned_prompt import LearnedPrompt
from paca.planning.setting import PAIRED, Setting
from paca.pretrained.image_shape import image_shape

COPY = "ref"
"""What TRL calls the copy of an adapter."""

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
        return {"pixel_values": torch.zeros(batch_size, *image_shape(model.config), dtype=model.dtype), **labels}
    paired = task == "pairs" or setting.trainer in PAIRED
    rows = 2 * batch_size if paired else batch_size  # the chosen answers, then the rejected ones
    tokens = torch.zeros(rows, setting.sequence_length, dtype=torch.int64)
    inputs = {"input_ids": tokens}
    if padded or paired:
        inputs["attention_mask"] = tokens.clone()
    if task == "text":
        return {**inputs, "labels": tokens.clone()}
    text = model.config.get_text_config()
    text.pad_token_id = getattr(text, "pad_token_id", None) or 0
    return inputs if task == "pairs" else inputs | labels


def loss_of(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    setting: Setting,
    reference: PreTrainedModel | None = None,
    before_reference: Callable[[], None] = lambda: None,
) -> Tensor:
    """The loss of a pass.

    Args:
        model: With TRL's output head, where the loss is chunked.
        inputs: Of `inputs_of`.
        setting: How it is trained.
        reference: A second copy, where it is held against one.
        before_reference: Called between the two passes that `dpo` makes.
    """
    task = task_of(model)
    if task == "images":
        return model(**inputs).loss
    options: dict[str, Any] = {"fused_lm_head": True} if setting.chunked_loss and task == "text" else {}
    result = model(**inputs, use_cache=False, **options)
    if setting.trainer == "dpo":  # the sigmoid loss of TRL's DPOTrainer; the others differ in a few numbers a pair
        log_probs = result.log_probs.sum(1)
        if setting.reference is not None:
            before_reference()
            with torch.no_grad(), as_reference(model if reference is None else None, copied=setting.copied_adapter):
                compared = (reference or model)(**inputs, use_cache=False, **options).log_probs.sum(1)
            log_probs = log_probs - compared
        chosen, rejected = log_probs.chunk(2)
        return -logsigmoid(chosen - rejected).mean()
    if setting.answering is not None:  # as TRL's GRPOTrainer: a ratio to what they were when the answers were made
        log_probs = result.log_probs[:, -setting.answering.length :]
        ratio = torch.exp(log_probs - log_probs.detach())
        return -torch.min(ratio, ratio.clamp(0.8, 1.2)).sum(1).mean()
    if task != "pairs":
        return result.loss
    chosen, rejected = result.logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()  # as TRL's RewardTrainer


@contextmanager
def as_reference(model: nn.Module | None, *, copied: bool) -> Iterator[None]:
    """`model` with its adapter off, or with the copy of it that `hold_copy` made on; without one, nothing changes."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper, LearnedPrompt)
    layers: list[Any] = [] if model is None else [module for module in model.modules() if isinstance(module, kinds)]
    before = [(layer, layer.active_adapters) for layer in layers if copied]
    for layer in layers:
        layer.set_adapter(COPY) if copied else layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, active in before:
            layer.set_adapter(active)
        for layer in layers if not copied else ():
            layer.enable_adapters(True)


def hold_copy(adapted: PeftModel) -> None:
    """Put a second adapter of the same kind beside the active one, as TRL's DPOTrainer holds what a run began with."""
    adapted.add_adapter(COPY, adapted.active_peft_config)

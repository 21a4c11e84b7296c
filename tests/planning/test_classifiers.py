"""Plans of classifiers and reward models: what the autograd graph holds, against what real passes make it hold."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from architectures import config
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

import paca
from paca.bench.saved_activations import measure_saved_activations
from paca.planning import Setting, estimate
from paca.planning.target import Target

TEXTS, IMAGES = AutoModelForSequenceClassification, AutoModelForImageClassification
VIT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32}
CONVOLUTIONS = {
    "architecture": "tf_efficientnetv2_s",
    "model_args": {"channel_multiplier": 0.25, "depth_multiplier": 0.1},
    "pretrained_cfg": {"input_size": [3, 48, 48]},
}


def texts(labels: int) -> tuple[Any, PreTrainedConfig]:
    return TEXTS, config("llama", num_hidden_layers=2, dtype=torch.bfloat16, num_labels=labels)


def images(model_type: str, **sizes: Any) -> tuple[Any, PreTrainedConfig]:
    return IMAGES, AutoConfig.for_model(model_type, num_labels=5, dtype=torch.float32, **sizes)


def measured(model: Any, batch: dict[str, Tensor], pairs: bool) -> int:
    """Bytes saved by a real forward pass."""

    def loss() -> Tensor:
        result = model(**batch)
        if not pairs:
            return result.loss
        chosen, rejected = result.logits.squeeze(-1).chunk(2)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    return measure_saved_activations(loss, model.train()).bytes


@pytest.mark.parametrize(
    ("made", "task_type", "targets", "head"),
    [
        (texts(3), "SEQ_CLS", None, "score"),
        (texts(1), "SEQ_CLS", None, "score"),
        (images("vit", **VIT), None, None, "classifier"),
        (images("timm_wrapper", **CONVOLUTIONS), None, r".*[.](conv_pw|conv_pwl)", "timm_model.classifier"),
    ],
    ids=["labels", "reward", "vit", "convolutions"],
)
def test_planned_activations_are_the_measured_ones(
    made: tuple[Any, PreTrainedConfig], task_type: str | None, targets: str | None, head: str
) -> None:
    auto_class, shape = made
    adapter = paca.PacaConfig(r=4, task_type=task_type, target_modules=targets, modules_to_save=[head])
    with torch.device("meta"):
        outline = auto_class.from_config(copy.deepcopy(shape))
    planned = estimate(outline, Setting(sequence_length=40, batch_size=2, padded=True), adapter)
    pairs, labels = shape.num_labels == 1, {"labels": torch.zeros(2, dtype=torch.int64)}
    if auto_class is IMAGES:
        size = 48 if shape.model_type == "timm_wrapper" else 32
        batch = {"pixel_values": torch.zeros(2, 3, size, size), **labels}
    else:
        mask = torch.ones(4 if pairs else 2, 40, dtype=torch.int64)
        mask[0, -3:] = 0
        batch = {"input_ids": mask.clone(), "attention_mask": mask, **({} if pairs else labels)}
    real = peft.get_peft_model(auto_class.from_config(shape), adapter)
    assert planned.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    found = measured(real, batch, pairs)
    print(f"{shape.model_type}: planned {planned.activations:,} measured {found:,}")
    assert planned.activations == pytest.approx(found, rel=0.05)
    assert not planned.setting.chunked_loss


@pytest.mark.parametrize(
    ("made", "width"),
    [
        (images("convnext", hidden_sizes=[8, 16, 24, 40], depths=[1] * 4), 40),
        (images("timm_wrapper", **CONVOLUTIONS), 320),
    ],
    ids=["transformers", "timm"],
)
def test_the_width_of_convolutions_is_that_of_their_head(made: tuple[Any, PreTrainedConfig], width: int) -> None:
    auto_class, shape = made
    with torch.device("meta"):
        outline = auto_class.from_config(copy.deepcopy(shape))
    assert Target("model", outline, paca.PacaConfig(r=4), Setting(sequence_length=1)).hidden_size == width


def test_other_models_are_refused() -> None:
    with torch.device("meta"):
        masked = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=1))
    with pytest.raises(paca.PacaError, match="causal language models and classifiers of transformers, not for Bert"):
        estimate(masked, Setting(8))

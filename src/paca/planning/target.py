"""What a plan is made for: a model's name or a published shape, and the setting that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.planning.setting import Setting
from paca.pretrained import load_config
from paca.pretrained.context_length import context_length
from paca.pretrained.loading import DTYPES
from paca.pretrained.published_shapes import SHAPES, TIMM, check_not_a_mistyped_shape, timm_config


@dataclass(frozen=True)
class Target:
    """A model with its adapter, and the setting that plans start from."""

    name: str
    model: PreTrainedModel
    """On the meta device, without its adapter."""
    adapter: PeftConfig | None
    """Of what is put into it; None where all of it is trained."""
    setting: Setting
    lengths: str | None = None
    """Where a run's sequence length is from, for people."""
    warning: str | None = None
    """What is said of a run's data that is here and could not be read."""
    typical_length: int | None = None
    """Tokens to which a run's batches are padded on average; `setting` has the longest."""
    steps: int | None = None
    """Optimizer steps of a run, where they are given, or follow from data that was read."""
    checkpointing_key: str = "gradient_checkpointing"
    """What activation checkpointing is called in a run's `train`."""
    before: str | None = None
    """What a run does before it trains, which no plan counts."""
    counts: str = "tokens"
    """What passes are counted in: tokens, or images, each of which has the length 1 in `setting`."""

    @property
    def dtype(self) -> torch.dtype:
        """What its matrix products are computed in."""
        return self.setting.autocast or next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states; of a network of convolutions, which has many, that of the last: its head's."""
        width = getattr(self.model.config.get_text_config(), "hidden_size", None)
        return int(width or [weight.shape[1] for weight in self.model.parameters() if weight.ndim > 1][-1])

    @property
    def positions(self) -> int | None:
        """The longest sequence it was made for, where it says so."""
        return context_length(self.model)


def target_of_model(name: str, dtype: str, r: int, setting: Setting) -> Target:
    """The model `name` (as for `outline_of`) with PaCA of rank `r` in all linear layers, planned from `setting`."""
    try:
        adapter = PacaConfig(r=r, task_type="CAUSAL_LM")
    except ValueError as error:
        raise PacaError(str(error)) from error
    return Target(name, outline_of(name, dtype), adapter, setting)


def outline_of(
    name: str,
    dtype: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    labels: Sequence[str] | None = None,
) -> PreTrainedModel:
    """A model without weights: a preset of `paca bench`, or a checkpoint (a hub id, a folder, a `.gguf` file).

    `dtype` is that of the weights; `"auto"` is the checkpoint's own, and for a preset bfloat16 (of an image model
    float32). `auto_class` and `labels` are as in `paca.pretrained.load_config`.

    Raises:
        PacaError: There is no such model or dtype.
    """
    shape = SHAPES.get(name)
    if shape is None and name not in TIMM:
        check_not_a_mistyped_shape(name)
        return load_config(name, dtype, revision, trust_remote_code, auto_class, labels).model
    vision = shape is None or shape.vision
    if vision != (auto_class is AutoModelForImageClassification):
        raise PacaError(
            f"{name} is {'an image' if vision else 'a language'} model. Give one that goes with what is planned: image "
            "models are planned for runs of train.trainer: image_classification (paca plan RUN.yaml --set "
            "model.name=...), and for no others."
        )
    if dtype != "auto" and dtype not in DTYPES:
        raise PacaError(f"Unknown dtype {dtype!r}. Give one of: auto, {', '.join(DTYPES)}.")
    config = timm_config(name) if shape is None else shape.config()
    config.dtype = DTYPES.get(dtype, torch.float32 if vision else torch.bfloat16)
    if labels is not None:
        config.num_labels = len(labels)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config, dtype=config.dtype, trust_remote_code=False)
    model.tie_weights()
    return model

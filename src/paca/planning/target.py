"""What a plan is made for: a model's name or a published shape, and the setting that it starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.planning.estimate import prepare_model
from paca.planning.setting import Setting
from paca.pretrained import load_config
from paca.pretrained.loading import DTYPES
from paca.pretrained.published_shapes import SHAPES, check_not_a_mistyped_shape


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
    typical_length: int | None = None
    """Tokens to which a run's batches are padded on average; `setting` has the longest."""
    steps: int | None = None
    """Optimizer steps of a run that says how many."""

    @property
    def dtype(self) -> torch.dtype:
        """What its matrix products are computed in."""
        return self.setting.autocast or next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def positions(self) -> int | None:
        """The longest sequence it was made for, where it says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def target_of_model(name: str, dtype: str, r: int, setting: Setting) -> Target:
    """The model `name` (as for `outline_of`) with PaCA of rank `r` in all linear layers, planned from `setting`."""
    try:
        adapter = PacaConfig(r=r, task_type="CAUSAL_LM")
    except ValueError as error:
        raise PacaError(str(error)) from error
    return Target(name, outline_of(name, dtype), adapter, setting)


def outline_of(name: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights: a preset of `paca bench`, or a checkpoint (a hub id, a folder, a `.gguf` file).

    `dtype` is that of the weights; `"auto"` is the checkpoint's own, and bfloat16 for a preset.

    Raises:
        PacaError: There is no such model or dtype.
    """
    shape = SHAPES.get(name)
    if shape is None:
        check_not_a_mistyped_shape(name)
        return load_config(name, dtype, revision, trust_remote_code).model
    if shape.vision:
        raise PacaError(f"{name} is an image model; plans can be made for language models only.")
    if dtype != "auto" and dtype not in DTYPES:
        raise PacaError(f"Unknown dtype {dtype!r}. Give one of: auto, {', '.join(DTYPES)}.")
    config = shape.config()
    config.dtype = DTYPES.get(dtype, torch.bfloat16)
    model = prepare_model(config)
    assert isinstance(model, PreTrainedModel)
    return model

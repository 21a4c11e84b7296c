"""What the user asked a plan for: a run's YAML, a model's name, or a published shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.planning.estimate import prepare_model
from paca.planning.run_setting import setting_of_run
from paca.planning.setting import Setting
from paca.pretrained import load_config
from paca.pretrained.published_shapes import SHAPES, check_not_a_mistyped_shape

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Target:
    """A model with its adapter, and the setting that plans start from."""

    name: str
    model: PreTrainedModel
    """On the meta device, without its adapter."""
    adapter: PacaConfig
    """That is put into it."""
    setting: Setting
    lengths: str | None = None
    """Where a run's sequence length is from, for people."""

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
    """The model `name` with PaCA of rank `r` in all linear layers.

    Args:
        name: a hub id, a folder, a `.gguf` file, or a preset of `paca bench`.
        dtype: of the weights; `"auto"` is the checkpoint's own, and bfloat16 for a preset.
        r: trained columns per layer.
        setting: what the plan starts from.

    Raises:
        PacaError: there is no such model or dtype.
    """
    try:
        adapter = PacaConfig(r=r, task_type="CAUSAL_LM")
    except ValueError as error:
        raise PacaError(str(error)) from error
    return Target(name, _outline(name, dtype), adapter, setting)


def target_of_run(
    path: Path, overrides: Sequence[str], device: str, sequence_length: int | None, batch_size: int | None
) -> Target:
    """The run that a YAML file describes. Its sequences are as long as its longest example, where that is soon found.

    Args:
        path: as for `paca train`.
        overrides: `"section.key=value"` each.
        device: `"cpu"` or `"cuda"`.
        sequence_length: in place of the longest example and `train.max_length`.
        batch_size: in place of `train.per_device_train_batch_size`.

    Raises:
        PacaError: the config is wrong, the model can't be found, or nothing limits its sequences.
    """
    from paca.training import load_run_config, train_settings
    from paca.training.adapter_settings import outline_config
    from paca.training.longest_example import longest_example

    config = load_run_config(path, overrides)
    named = config.model
    outline = _outline(named.name, named.dtype, named.revision, named.trust_remote_code)
    config.train = train_settings.with_defaults(
        config.train,
        has_eval=config.data.eval is not None,
        weights_dtype=next(outline.parameters()).dtype,
        context_length=getattr(outline.config.get_text_config(), "max_position_embeddings", None),
    )
    longest, lengths = None, None
    if sequence_length is not None:
        config.train["max_length"] = sequence_length
    else:
        longest, lengths = longest_example(config)
    setting = setting_of_run(config, device, longest)
    if lengths is not None and longest is None:
        lengths = f"train.max_length: {lengths}"
    elif longest is not None and setting.sequence_length < longest:
        lengths = f"train.max_length, which cuts {lengths}"
    if batch_size is not None:
        setting = replace(setting, batch_size=batch_size)
    return Target(str(path), outline, outline_config(config.paca), setting, lengths)


def _outline(name: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    shape = SHAPES.get(name)
    if shape is None:
        check_not_a_mistyped_shape(name)
        return load_config(name, dtype, revision, trust_remote_code).model
    if shape.vision:
        raise PacaError(f"{name} is an image model; plans can be made for language models only.")
    if dtype != "auto" and dtype not in _DTYPES:
        raise PacaError(f"Unknown dtype {dtype!r}. Give one of: auto, {', '.join(_DTYPES)}.")
    config = shape.config()
    config.dtype = _DTYPES.get(dtype, torch.bfloat16)
    model = prepare_model(config)
    assert isinstance(model, PreTrainedModel)
    return model

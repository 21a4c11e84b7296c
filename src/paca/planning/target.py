"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from paca.config import PacaConfig
from paca.planning.setting import Setting


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

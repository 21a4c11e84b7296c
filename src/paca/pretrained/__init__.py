"""Pretrained models and tokenizers, from the hub, a folder or a GGUF file, ready to be trained."""

from __future__ import annotations

from paca.pretrained.loading import Outline, Pretrained, load_config, load_pretrained, load_tokenizer
from paca.pretrained.trainable_copy import save_trainable_copy

__all__ = ["Outline", "Pretrained", "load_config", "load_pretrained", "load_tokenizer", "save_trainable_copy"]

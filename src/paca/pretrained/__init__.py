"""Pretrained models and tokenizers, from the hub, a folder or a GGUF file, ready to be trained."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.pretrained.loading import (
        Outline,
        Pretrained,
        load_config,
        load_image_processor,
        load_pretrained,
        load_tokenizer,
    )
    from paca.pretrained.trainable_copy import save_trainable_copy

__all__ = [
    "Outline",
    "Pretrained",
    "load_config",
    "load_image_processor",
    "load_pretrained",
    "load_tokenizer",
    "save_trainable_copy",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: they import transformers, for which a mistyped preset should not have to wait.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "trainable_copy" if name == "save_trainable_copy" else "loading"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

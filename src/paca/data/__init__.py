"""Training data: read it, recognise its form, and shape it into what the trainers take."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.data.chat_template import end_of_turn, set_chat_template
    from paca.data.examples import Examples, split_heldout
    from paca.data.images import load_images, open_image
    from paca.data.labels import check_labels
    from paca.data.loading import load_examples
    from paca.data.tokens import encode, tokenize, training_template

__all__ = [
    "Examples",
    "check_labels",
    "encode",
    "end_of_turn",
    "load_examples",
    "load_images",
    "open_image",
    "set_chat_template",
    "split_heldout",
    "tokenize",
    "training_template",
]

_MODULES = {
    "end_of_turn": "chat_template",
    "set_chat_template": "chat_template",
    "Examples": "examples",
    "split_heldout": "examples",
    "load_images": "images",
    "open_image": "images",
    "check_labels": "labels",
    "load_examples": "loading",
    "encode": "tokens",
    "tokenize": "tokens",
    "training_template": "tokens",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: they import datasets, for which a misspelt file name should not have to wait.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

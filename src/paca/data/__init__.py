"""Training data: read it, recognise its form, and shape it into what the trainers take."""

from __future__ import annotations

from paca.data.assistant_turns import mark_assistant_turns
from paca.data.examples import Examples, load_examples, split_heldout, tokens_of
from paca.data.images import load_images, open_image
from paca.data.labels import check_labels, loss_settings

__all__ = [
    "Examples",
    "check_labels",
    "load_examples",
    "load_images",
    "loss_settings",
    "mark_assistant_turns",
    "open_image",
    "split_heldout",
    "tokens_of",
]

"""Training data: read it, recognise its form, and shape it into what TRL's SFTTrainer takes."""

from __future__ import annotations

from paca.data.assistant_turns import mark_assistant_turns
from paca.data.examples import Examples, load_examples, split_heldout, tokens_of
from paca.data.images import LabelledImages, load_images
from paca.data.labels import check_labels, loss_settings

__all__ = [
    "Examples",
    "LabelledImages",
    "check_labels",
    "load_examples",
    "load_images",
    "loss_settings",
    "mark_assistant_turns",
    "split_heldout",
    "tokens_of",
]

"""Training data: read it, recognise its form, and shape it into what TRL's SFTTrainer takes."""

from __future__ import annotations

from paca.data.chat_template import end_of_turn, set_chat_template
from paca.data.examples import Examples, load_examples, split_heldout
from paca.data.images import LabelledImages, load_images
from paca.data.labels import check_labels
from paca.data.tokens import encode, tokenize, training_template

__all__ = [
    "Examples",
    "LabelledImages",
    "check_labels",
    "encode",
    "end_of_turn",
    "load_examples",
    "load_images",
    "set_chat_template",
    "split_heldout",
    "tokenize",
    "training_template",
]

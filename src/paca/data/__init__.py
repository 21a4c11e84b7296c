"""Training data: read it, recognise its form, and shape it into what the trainers take."""

from __future__ import annotations

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

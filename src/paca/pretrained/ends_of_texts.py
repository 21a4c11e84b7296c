"""Tokenizers that put the end-of-text token after whatever they are given, as with `add_eos_token`."""

from __future__ import annotations

from typing import Any


def ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer is one of them."""
    end = tokenizer.eos_token_id
    return end is not None and list(tokenizer("a")["input_ids"])[-1:] == [end]

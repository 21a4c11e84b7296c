"""Tokenizers that put the end-of-text token after whatever they are given, as with `add_eos_token`."""

from __future__ import annotations

from typing import Any


def ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer is one of them."""
    end = tokenizer.eos_token_id
    try:
        with_it, without = ([*tokenizer("a", add_special_tokens=added)["input_ids"]] for added in (True, False))
    except Exception:  # a vocabulary of words that has no such word
        return False
    return end is not None and with_it[-1:] == [end] and with_it[-2:-1] == without[-1:] and len(with_it) > len(without)

"""The tokenizer that lies in an adapter's folder, whose maker may mean harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import json_object
from paca.pretrained.loading import load_tokenizer

MOST_GROWTH = 1_000
"""How much longer a text may become before it is split into tokens."""
HIGHEST = 2**22
"""Of a token's number: who writes a tokenizer goes through all numbers up to it. Public models have up to a million."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_INSTEAD = "Delete the tokenizer's files from that folder, and the base model's tokenizer is taken."


def load_adapter_tokenizer(adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an adapter's folder, whose entries were checked (`check_entries`).

    Raises:
        PacaError: A file is broken, lets texts grow beyond all bounds, or numbers tokens so; names it.
    """
    for file in sorted(adapter.glob("*.json")):
        if file.is_file():
            content = json_object(file)
            if file.name == "tokenizer.json" and _growth([content.get(step) for step in _STEPS]) > MOST_GROWTH:
                raise PacaError(
                    f"{file} makes texts over {MOST_GROWTH:,} times as long. It is made to do harm. {_INSTEAD}"
                )
            highest = max(_numbers(file.name, content), default=0)
            if highest > HIGHEST:
                raise PacaError(
                    f"{file} has a token of number {highest:,}; {HIGHEST:,} is the highest. It is broken, or made to "
                    f"do harm. {_INSTEAD}"
                )
    return load_tokenizer(str(adapter))


def _numbers(name: str, content: dict[str, Any]) -> Iterator[int]:
    """The numbers of tokens in a file of a tokenizer."""
    model, found = content.get("model"), content.get("added_tokens")
    vocabulary = content if name in ("vocab.json", "added_tokens.json") else None
    if name == "tokenizer.json":
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        added = [one.get("id") for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        yield from (number for number in added if isinstance(number, int))
    if isinstance(vocabulary, dict):
        yield from (number for number in vocabulary.values() if isinstance(number, int))


def _growth(part: Any) -> float:
    """By which factor the replacements in a part of a tokenizer's file make a text longer, at most."""
    factor = 1.0
    waiting = [part]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            content = one.get("content")
            factor *= max(1, len(content)) if one.get("type") == "Replace" and isinstance(content, str) else 1
            if factor > MOST_GROWTH:
                break
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return factor

"""The tokenizer that lies in an adapter's folder, whose maker may mean harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import json_object
from paca.pretrained.loading import load_tokenizer

MOST_GROWTH = 1_000
"""How much longer a text may become before it is split into tokens."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def load_adapter_tokenizer(adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an adapter's folder, whose entries were checked (`check_entries`).

    Raises:
        PacaError: A file is broken, or lets texts grow beyond all bounds; names it.
    """
    for file in sorted(adapter.glob("*.json")):
        if file.is_file():
            content = json_object(file)
            if file.name == "tokenizer.json" and _growth([content.get(step) for step in _STEPS]) > MOST_GROWTH:
                raise PacaError(f"{file} makes texts over {MOST_GROWTH:,} times as long. It is made to do harm.")
    return load_tokenizer(str(adapter))


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

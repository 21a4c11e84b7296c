"""The tokenizer that lies in an adapter's folder, whose maker may mean harm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError
from paca.messages.shown import printable, shown
from paca.pretrained.adapter_folder import json_object
from paca.pretrained.loading import load_tokenizer

MOST_GROWTH = 1_000
"""How much longer a text may become before it is split into tokens."""
HIGHEST = 2**22
"""Of a token's number: who writes a tokenizer goes through all numbers up to it. Public models have up to a million."""
MOST_MADE = 10_000
"""Of tokens that a tokenizer makes by itself: public ones make a hundred."""
_COUNTS = ("extra_ids", "offset", "num_madeup_words")
"""Settings that say how many. transformers 5.24 builds a list of so many texts."""
_FILES = ("vocab", "merges", "gguf_file", "init_inputs")
"""Settings of which transformers 5.24 takes a text for a file's name, wherever that lies. Of names that end in `_file`
it takes those of the folder only; `name_or_path` it replaces."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_INSTEAD = "Delete the tokenizer's files from that folder, and the base model's tokenizer is taken."


def load_adapter_tokenizer(adapter: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an adapter's folder, whose entries were checked (`check_entries`).

    Raises:
        PacaError: A file is broken, names a file elsewhere, lets texts grow beyond all bounds, or numbers tokens so;
            names it.
    """
    for file in sorted(adapter.glob("*.json")):
        if file.is_file():
            content = json_object(file)
            if file.name == "tokenizer.json" and _growth([content.get(step) for step in _STEPS]) > MOST_GROWTH:
                raise PacaError(
                    f"{file} makes texts over {MOST_GROWTH:,} times as long. It is made to do harm. {_INSTEAD}"
                )
            if file.name == "tokenizer_config.json":
                _check_settings(file, content)
            highest = max(_numbers(file.name, content), default=0)
            if highest > HIGHEST:
                raise PacaError(
                    f"{file} has a token of number {highest:,}; {HIGHEST:,} is the highest. It is broken, or made to "
                    f"do harm. {_INSTEAD}"
                )
    return load_tokenizer(str(adapter))


def _check_settings(file: Path, content: dict[str, Any]) -> None:
    """Raise `PacaError` if the settings of a tokenizer name a file, or want too many tokens made."""
    for name, value in content.items():
        texts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        if name in _FILES:
            names_file = isinstance(value, str) or (name == "init_inputs" and bool(texts))
        else:
            exempt = name.endswith(("_file", "name_or_path", "_token"))
            names_file = not exempt and any(os.sep in one.strip(os.sep) and _exists(one) for one in texts)
        if names_file:
            raise PacaError(
                f"{file} names a file elsewhere in {printable(name)}: {shown(value)}. A tokenizer may read files of "
                f"its own folder only. {_INSTEAD}"
            )
        if name in _COUNTS and isinstance(value, (int, float)) and value > MOST_MADE:
            raise PacaError(f"{file} wants {name}={value:,}; {MOST_MADE:,} are the most. {_INSTEAD}")


def _exists(path: str) -> bool:
    try:
        return len(path) < 4096 and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


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


def saved_tokenizer(adapter: Path) -> PreTrainedTokenizerBase | None:
    """The one saved with an adapter, which it was trained with: its chat template may differ from the base model's."""
    return load_adapter_tokenizer(adapter) if (adapter / "tokenizer_config.json").is_file() else None

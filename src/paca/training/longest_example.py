"""The longest example of a run, for plans: found out where that takes reading local files, and little else."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.data import load_examples
from paca.messages.errors import PacaError
from paca.training.loss_scope import tokenizer_of
from paca.training.run_config import RunConfig

READ_AT_MOST = 64 * 2**20
"""Bytes of data files; more would take more than a few seconds."""
TOKENIZED = 256
"""Examples that are tokenized, those with the most characters: the one with the most tokens is among them, or about as
long as the longest of them."""


def longest_example(config: RunConfig) -> tuple[int | None, str]:
    """Tokens of the longest training example before it is cut, and where that is from, for people.

    Held-out examples that are split off the training data count as well. The number is None, and the text says why,
    where the data is not in local files, is large, or is packed.
    """
    data, train = config.data, config.train
    if train.get("packing"):
        return None, "packed sequences are filled up"
    source = Path(data.train).expanduser()
    files = [source] if source.is_file() else sorted(source.iterdir()) if source.is_dir() else []
    if not files:
        return None, f"{data.train} is not a local file, so it was not read"
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > READ_AT_MOST:
        return None, f"{data.train} has {size >> 20} MiB, so it was not read"
    try:
        tokenizer = tokenizer_of(config.model, train)
        conversational = tokenizer.chat_template is not None
        examples = load_examples(
            data.train, format=data.format, split=data.split, limit=data.limit, conversational=conversational
        )
    except PacaError as error:
        return None, f"the examples could not be read ({error})"
    longest = heapq.nlargest(TOKENIZED, (dict(row) for row in examples.dataset), key=_characters)
    return max(_tokens(example, tokenizer) for example in longest), f"the longest example of {data.train}"


def _characters(example: dict[str, Any]) -> int:
    return sum(
        len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False, default=str))
        for name, value in example.items()
        if name in ("text", "prompt", "completion", "messages", "tools")
    )


def _tokens(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """As TRL's SFTTrainer tokenizes it: with the chat template, or with the end-of-text token added."""
    parts = [example[name] for name in ("messages", "prompt", "completion", "text") if example.get(name) is not None]
    if isinstance(parts[0], str):
        text, end = "".join(parts), str(tokenizer.eos_token or "")
        return len(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
    messages = [message for part in parts for message in part]
    rendered: Any = tokenizer.apply_chat_template(messages, tools=example.get("tools"), return_dict=True)
    return len(rendered["input_ids"])

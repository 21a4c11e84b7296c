"""The examples of benchmarks/selection.py as batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paca.data import load_examples

ANSWER_TOKENS = 32  # an example must have so many left when it is cut


@dataclass(frozen=True)
class Data:
    """A data set's examples, tokenized: `input_ids` and `labels` each."""

    train: list[dict[str, list[int]]]
    held_out: list[dict[str, list[int]]]


def tokenized(file: str, tokenizer: Any, max_tokens: int) -> list[dict[str, list[int]]]:
    """The examples of `file`, cut to `max_tokens`; those with too little answer left are dropped."""
    examples = []
    for row in load_examples(file).dataset:
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:max_tokens]
        if len(whole) - len(prompt) >= ANSWER_TOKENS:
            assert whole[: len(prompt)] == prompt
            labels = [-100] * len(prompt) + whole[len(prompt) :]
            examples.append({"input_ids": whole, "labels": labels})
    return examples


def collated(examples: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """One batch, padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", pad), "attention_mask": mask, "labels": padded("labels", -100)}

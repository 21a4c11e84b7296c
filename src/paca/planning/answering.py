"""What a language model holds while it makes answers (`train.trainer: grpo`): above all their keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from paca.planning.live_memory import LiveMemory

CACHE = "keys and values"


def make_answers(model: PreTrainedModel, memory: LiveMemory, answers: int, length: int, new_tokens: int) -> None:
    """Run the prompts and the last token of `answers` sequences, as `generate` does, without values.

    Args:
        model: On fake tensors.
        memory: Follows what is allocated; it is active.
        answers: Made at a time.
        length: Of prompt and answer, in tokens.
        new_tokens: Of the answer.
    """
    prompt = length - new_tokens
    cache = _Followed(model.config, memory)
    _pick(_logits(model, cache, torch.zeros(answers, prompt, dtype=torch.int64), prompt))
    cache.lengthen(length - 1)
    _pick(_logits(model, cache, torch.zeros(answers, 1, dtype=torch.int64), length))


class _Followed(DynamicCache):
    """What it allocates is told apart."""

    def __init__(self, config: PreTrainedConfig, memory: LiveMemory) -> None:
        super().__init__(config=config)
        self.memory = memory

    def update(self, *args: Any, **kwargs: Any) -> Any:
        region, self.memory.region = self.memory.region, CACHE
        result = super().update(*args, **kwargs)
        self.memory.region = region
        return result

    def lengthen(self, length: int) -> None:
        """Let it hold `length` tokens, as far as a layer keeps them all; what has a state of one size stays."""
        region, self.memory.region = self.memory.region, CACHE
        layers: list[Any] = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        for layer in layers:
            kept = length
            if layer.is_sliding:
                kept, layer.cumulative_length = min(length, layer.sliding_window - 1), length
            for name in ("keys", "values"):
                batch, heads, _, width = (held := getattr(layer, name)).shape
                setattr(layer, name, None)
                setattr(layer, name, held.new_empty(batch, heads, kept, width))
                del held
        self.memory.region = region


def _logits(model: PreTrainedModel, cache: DynamicCache, tokens: Tensor, length: int) -> Tensor:
    mask = torch.ones(len(tokens), length, dtype=torch.int64)  # prompts are padded on their left
    result: Any = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return result.logits[:, -1]


def _pick(logits: Tensor) -> None:
    """`generate` samples from a copy in float32, and its softmax."""
    scores = logits.to(torch.float32, copy=True)
    scores.softmax(-1)

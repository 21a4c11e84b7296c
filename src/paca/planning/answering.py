"""What a language model holds while it makes answers (`train.trainer: grpo`): above all their keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from paca.planning import learned_prompt
from paca.planning.live_memory import LiveMemory

CACHE = "keys and values"
PROMPTS, LAST = "reading prompts", "making answers"


def make_answers(
    model: PreTrainedModel, backbone: nn.Module, memory: LiveMemory, answers: int, length: int, new_tokens: int
) -> list[str]:
    """Run the prompts and the last token of `answers` sequences, as `generate` does, without values.

    With learned tokens nothing is kept from token to token: the last one takes a pass over all of the sequence.

    Args:
        model: On fake tensors.
        backbone: The module of it that gives the last hidden states.
        memory: Follows what is allocated; it is active.
        answers: Made at a time.
        length: Of prompt and answer, in tokens.
        new_tokens: Of the answer.

    Returns:
        The windows of `memory` for each stretch, in each of which the number of blocks does not decide what is fullest.

    Raises:
        RuntimeError: The model does not run so.
    """
    prompt, windows = length - new_tokens, []
    learned = learned_prompt.cached_tokens(model)
    cache = None if learned is None else _Followed(model.config, memory)
    passes = [(PROMPTS, prompt, prompt), (LAST, 1, length)] if cache is not None else [(LAST, length, length)]
    for name, tokens, seen in passes:
        if cache is not None and name == LAST:
            cache.lengthen((learned or 0) + length - 1)
        memory.begin_window(name)
        output = f"{name}, output layer"
        hook = backbone.register_forward_hook(lambda *_, output=output: memory.begin_window(output))
        try:
            _pick(_logits(model, cache, torch.zeros(answers, tokens, dtype=torch.int64), seen))
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # a model that keeps something else
            raise RuntimeError(f"it can't be made to answer: {error}") from error
        finally:
            hook.remove()
        windows += [name, output]
    return windows


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


def _logits(model: PreTrainedModel, cache: DynamicCache | None, tokens: Tensor, length: int) -> Tensor:
    mask = torch.ones(len(tokens), length, dtype=torch.int64)  # prompts are padded on their left
    kept: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    result: Any = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1, **kept)
    return result.logits[:, -1]


def _pick(logits: Tensor) -> None:
    """`generate` samples from a copy in float32, and its softmax."""
    scores = logits.to(torch.float32, copy=True)
    scores.softmax(-1)

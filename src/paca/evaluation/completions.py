"""What a model answers: the likeliest token each time, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError
from paca.pretrained.generation import sampling_settings


def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answer prompts.

    Args:
        model: A causal language model in evaluation mode, with or without an adapter.
        tokenizer: Its tokenizer; answers are decoded without special tokens.
        prompts: The tokens of each. One that leaves no room for an answer loses its beginning.
        max_new_tokens: Length at which an answer is cut.
        batch_size: How many at a time.
        progress: Called with the number that was answered since the last call.

    Returns:
        One answer for each prompt, in the order given.

    Raises:
        PacaError: The answers alone would be longer than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_new_tokens >= context:
        raise PacaError(
            f"Answers of {max_new_tokens:,} tokens leave no room for a prompt in the model's context of {context:,}. "
            "Ask for shorter ones."
        )
    fitted = [prompt if context is None else prompt[-(context - max_new_tokens) :] for prompt in prompts]
    order = sorted(range(len(fitted)), key=lambda index: -len(fitted[index]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = _answer(model, tokenizer, [fitted[index] for index in chosen], max_new_tokens)
        answers.update(zip(chosen, texts, strict=True))
        if progress is not None:
            progress(len(chosen))
    return [answers[index] for index in range(len(fitted))]


@torch.no_grad()
def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    settings = sampling_settings(model, tokenizer, temperature=0)
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = settings.get("eos_token_id", [0])[0]
    tokens = torch.full((len(prompts), width), settings["pad_token_id"], dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generated = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        **settings,
    )[:, width:].tolist()
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in generated]

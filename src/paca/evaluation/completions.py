"""What a model answers: the likeliest token each time, in batches padded on the left (of a learned prompt, in batches
of one length)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from paca.evaluation.batches import longest_first
from paca.evaluation.kept_lines import KeptAnswers
from paca.messages.errors import PacaError
from paca.pretrained.context_length import context_length
from paca.pretrained.generation_settings import learns_a_prompt, sampling_settings


@torch.no_grad()
def completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    kept: KeptAnswers | None = None,
    what: str = "answers written",
) -> list[str]:
    """Answer prompts.

    Args:
        model: A causal language model in evaluation mode, with or without an adapter.
        tokenizer: Its tokenizer; answers are decoded without special tokens.
        prompts: The tokens of each. One that leaves no room for an answer loses its beginning.
        max_new_tokens: Length at which an answer is cut.
        batch_size: How many at a time.
        kept: Where answers of this length are kept, if anywhere.
        what: The words for people who wait.

    Returns:
        One answer for each prompt, in the order given.

    Raises:
        PacaError: The answers alone would be longer than the model's context.
    """
    context = context_length(model)
    if context is not None and max_new_tokens >= context:
        raise PacaError(
            f"Answers of {max_new_tokens:,} tokens leave no room for a prompt in the model's context of {context:,}. "
            "Ask for shorter ones (--max-new-tokens; of a run's own data eval.max_new_tokens)."
        )
    settings = sampling_settings(model, tokenizer, temperature=0)
    if settings["pad_token_id"] is None:
        settings["pad_token_id"] = settings.get("eos_token_id", [0])[0]

    def answer(batch: list[list[int]]) -> list[str]:
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in batch]
        tokens = pad_sequence(rows, batch_first=True, padding_value=settings["pad_token_id"], padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        generated = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            **settings,
        )[:, tokens.shape[1] :].tolist()
        return [str(tokenizer.decode(said, skip_special_tokens=True)) for said in generated]

    def answer_by_length(batch: list[list[int]]) -> list[str]:
        return [text for _, alike in groupby(batch, key=len) for text in answer(list(alike))]

    # What padding stands between learned tokens and a prompt would change the answer.
    run = answer_by_length if learns_a_prompt(model) else answer
    fitted = [prompt if context is None else prompt[-(context - max_new_tokens) :] for prompt in prompts]
    return longest_first(run, fitted, len, batch_size, what, kept)

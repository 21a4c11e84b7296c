"""How likely a model finds given answers: batches of prompts and answers, padded on the right."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence

from paca.data.tokens import IGNORED
from paca.evaluation.batches import longest_first
from paca.evaluation.kept_lines import KeptAnswers
from paca.messages.errors import PacaError
from paca.pretrained.context_length import context_length
from paca.pretrained.generation_settings import learns_a_prompt

TOGETHER = 512
"""Tokens whose logits are made at once: at 128k words 128 MiB of 16-bit ones."""


class Continuation(NamedTuple):
    """A prompt and what is to follow it, as tokens."""

    prompt: list[int]
    """At least one token: the first token of an answer is predicted from what is before it."""
    answer: list[int]
    """At least one token."""


class Likelihood(NamedTuple):
    """What a model says of one answer."""

    log_probability: float
    """Of the whole answer given the prompt, in nats."""
    tokens: int
    """Tokens of the answer."""
    correct: int
    """How many of them were the model's first guess."""

    @property
    def per_token(self) -> float:
        """The log-probability divided by the number of tokens."""
        return self.log_probability / self.tokens


def likelihoods(
    model: Any, continuations: Sequence[Continuation], *, batch_size: int = 8, kept: KeptAnswers | None = None
) -> list[Likelihood]:
    """Score answers.

    Args:
        model: A causal language model in evaluation mode, with or without an adapter.
        continuations: What to score. A prompt that is too long for the model loses its beginning.
        batch_size: How many at a time.
        kept: Where the scores are kept, if anywhere.

    Returns:
        One for each, in the order given. Sums are taken in float32.

    Raises:
        PacaError: An answer alone is longer than the model's context.
    """
    context = context_length(model)
    fitted = [_fitted(continuation, context) for continuation in continuations]

    def length(one: Continuation) -> int:
        return len(one.prompt) + len(one.answer)

    found = longest_first(partial(_score, model), fitted, length, batch_size, "answers scored", kept)
    return [Likelihood(*one) for one in found]


def _fitted(continuation: Continuation, context: int | None) -> Continuation:
    assert continuation.prompt
    assert continuation.answer
    # The last token is predicted and never read, so one more than the context fits.
    if context is None or len(continuation.prompt) + len(continuation.answer) <= context + 1:
        return continuation
    room = context + 1 - len(continuation.answer)
    if room < 1:
        raise PacaError(
            f"An answer is {len(continuation.answer):,} tokens long; the model's context is {context:,}. Shorten it, "
            "or leave the example out."
        )
    return Continuation(continuation.prompt[-room:], continuation.answer)


@torch.no_grad()
def _score(model: Any, batch: list[Continuation]) -> list[Likelihood]:
    rows = [torch.tensor((entry.prompt + entry.answer)[:-1]) for entry in batch]
    answers = [torch.tensor([IGNORED] * (len(entry.prompt) - 1) + entry.answer) for entry in batch]
    tokens = pad_sequence(rows, batch_first=True)
    targets = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    # Only the positions from the first answer on, a few of each row at a time: at 128k words, logits of all would be
    # the largest tensor by far (8 texts of 1,262 tokens with SmolLM2-135M in bfloat16: 1.8 GiB, and 0.5 so).
    # By their indices: of a slice, which isn't contiguous, a CPU makes the logits with a copy of the head for each row.
    kept = torch.arange(min(len(entry.prompt) - 1 for entry in batch), tokens.shape[1])
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(plain.forward).parameters
    all_of_them = learns_a_prompt(model) or "logits_to_keep" not in takes  # tokens of its own come before these
    body = plain.get_decoder()
    pieces = [kept] if all_of_them or body is plain else kept.split(max(TOGETHER // len(batch), 1))
    inputs = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    found = []
    with _once(body):
        for piece in pieces:
            only = {} if all_of_them else {"logits_to_keep": piece.to(model.device)}
            logits = model(**inputs, **only).logits[:, -len(piece) :]
            # One row at a time: a float32 copy of all logits would take twice the memory of 16-bit ones again.
            found.append([_likelihood(*of) for of in zip(logits, targets[:, piece].to(logits.device), strict=True)])
            del logits  # before the next are made
    return [Likelihood(*map(sum, zip(*parts, strict=True))) for parts in zip(*found, strict=True)]


@contextmanager
def _once(body: Any) -> Iterator[None]:
    """A model's `body` gives what it gave first: its model, called again for other logits, makes only these anew."""
    forward = body.forward
    given: list[Any] = []

    @wraps(forward)
    def first(*args: Any, **kwargs: Any) -> Any:
        if not given:
            given.append(forward(*args, **kwargs))
        return given[0]

    with patch.object(body, "forward", first):
        yield


def _likelihood(logits: torch.Tensor, targets: torch.Tensor) -> Likelihood:
    """Of `logits` `(tokens, words)` and `targets` `(tokens,)`, of which some are no part of an answer."""
    counted = targets != IGNORED
    logits, answer = logits[counted], targets[counted]
    total = float(torch.log_softmax(logits.float(), dim=-1).gather(1, answer[:, None]).sum())
    if math.isnan(total):  # else each comparison with it would be false, and the first option the best
        raise PacaError(
            f"The model's output is NaN, in {str(logits.dtype).removeprefix('torch.')}, so that nothing can be scored: "
            "its weights or the adapter's are broken, or they overflow. Try a checkpoint in bfloat16 or float32."
        )
    correct = (logits.argmax(dim=-1) == answer).sum()
    return Likelihood(total, len(answer), int(correct))

"""Find the assistant's tokens in a conversation when the chat template does not mark them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from paca.data.examples import ORIGIN, Examples, without_progress_bars
from paca.data.formats import Message
from paca.messages.errors import PacaError

_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\b")

ASSISTANT_MASK = "assistant_masks"
"""The column by which TRL takes a mask of trained tokens (1: trained) with tokenized examples."""


def marks_assistant_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether TRL can find the assistant's tokens by itself.

    That is so when the chat template has ``{% generation %}`` markers, or is one that TRL has a marked version of.
    """
    if tokenizer.chat_template is None:
        return False
    if _GENERATION_MARKER.search(tokenizer.get_chat_template()):
        return True
    try:
        get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):  # the template is not known, or fails on TRL's probes
        return False
    return True


def mark_assistant_turns(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenize conversations with a mask of the assistant's tokens, where TRL cannot make one.

    A conversation is rendered up to each assistant message, once without and once with it; what the message added,
    end-of-turn token included, is trained. Where a template renders an earlier message differently once others follow
    (some drop old reasoning), that message is left out of the loss, and the description counts those.

    Args:
        examples: any examples. Anything but ``messages``, and messages whose template TRL can deal with, come back
            unchanged.
        tokenizer: a fast tokenizer with a chat template.

    Returns:
        Examples with the columns ``input_ids`` and ``assistant_masks`` added, which TRL takes as they are.

    Raises:
        PacaError: there is no chat template, it fails on an example (which is named), or no message of an example
            could be found again.
    """
    if "messages" not in examples.dataset.column_names or marks_assistant_turns(tokenizer):
        return examples
    if tokenizer.chat_template is None:
        raise PacaError(
            f"{examples.source} holds conversations, but the tokenizer has no chat template to render them with. Use "
            "an instruction-tuned model, or name a template in train.chat_template_path."
        )
    if not tokenizer.is_fast:
        raise PacaError(
            "The chat template marks no assistant turns, and finding them otherwise needs a fast tokenizer. Convert "
            "the model's tokenizer (tokenizer.json), or give prompt/completion data."
        )
    with without_progress_bars():
        marked = examples.dataset.map(_mark, fn_kwargs={"tokenizer": tokenizer})
    skipped = sum(marked["skipped_turns"])
    note = "; which tokens are the assistant's was found by rendering each conversation turn by turn"
    if skipped:
        note += f", {skipped:,} turns left out because the template renders them differently later on"
    return replace(examples, dataset=marked.remove_columns("skipped_turns"), description=examples.description + note)


def _mark(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    messages: list[Message] = example["messages"]
    tools = json.loads(example["tools"]) if example.get("tools") else None
    place = example[ORIGIN]
    text = _render(tokenizer, messages, tools, place)
    spans: list[tuple[int, int]] = []
    skipped = 0
    for index, message in enumerate(messages):
        # An answer to nothing (index 0) cannot be told from the text that the template puts first.
        if message["role"] != "assistant" or index == 0:
            continue
        before = _render(tokenizer, messages[:index], tools, place, add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1], tools, place)
        if text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
        else:
            skipped += 1
    if not spans:
        raise PacaError(
            f"{place}: no assistant turn can be found in the rendered conversation (it begins with one, or the chat "
            "template renders it differently each time). Give the example as prompt and completion."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = _mask_of(encoding["offset_mapping"], spans)
    return {"input_ids": encoding["input_ids"], ASSISTANT_MASK: mask, "skipped_turns": skipped}


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None,
    place: str,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise PacaError(f"{place}: the tokenizer's chat template cannot render these messages: {error}") from error


def _mask_of(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that holds a character of a span.

    A token that merges the last characters of the prompt with the first of the answer counts: it is part of what the
    model has to produce in place of the prompt's own tokens, and TRL and transformers count it as well.
    """
    mask = []
    previous_end = 0
    remaining = iter(spans)
    start, end = next(remaining)
    for token_start, token_end in offsets:
        # Byte-level tokenizers trim spaces from offsets: a token of spaces alone is left with nothing, and begins
        # where the one before it ended.
        begin = token_start if token_end > token_start else previous_end
        while begin >= end and (following := next(remaining, None)) is not None:
            start, end = following
        mask.append(int(begin < end and token_end > start))
        previous_end = max(previous_end, token_end)
    return mask

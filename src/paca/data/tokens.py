"""Examples as tokens, and which of them the loss falls on: one way for every form of data and every chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from paca.data.conversion import ORIGIN, RENDERED
from paca.data.examples import Examples
from paca.data.formats import Example, Message, same_start
from paca.data.tool_calls import with_text_arguments
from paca.messages.errors import PacaError
from paca.pretrained.ends_of_texts import ends_texts

IGNORED = -100
"""The label of a token that does not count, in transformers and TRL."""

_LEFT_OUT = "left_out_turns"
WHY_LEFT_OUT = "they begin a conversation, or the template renders them differently later on"


@dataclass(frozen=True)
class Tokens:
    """An example as the model reads it."""

    ids: list[int]
    labels: list[int]
    """The same, and `IGNORED` where a token does not count in the loss."""
    left_out: int = 0
    """Answers that could not be found again in the whole conversation."""


def what_stays(limit: int | None, *, keep_end: bool = False) -> slice:
    """Of the tokens of an example that is cut to `limit`, as TRL cuts it: its start, or its end."""
    if limit is None:
        return slice(None)
    return slice(-limit, None) if keep_end else slice(limit)


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, *, everything: bool = False, processes: int | None = None
) -> Examples:
    """Add the columns `input_ids` and `labels`, which TRL's SFTTrainer takes as they are.

    Args:
        examples: Of any form.
        tokenizer: Of the model.
        everything: Let the loss fall on every token, not on the answers alone.
        processes: How many work at it.

    Raises:
        PacaError: As `encode`.
        TypeError: A name of a tokenizer, or a dataset alone: what was asked for at loading is not in it.
    """
    if not isinstance(examples, Examples):
        kind = type(examples).__name__
        raise TypeError(f"tokenize takes what load_examples gives, whole (not its .dataset), and got a {kind}.")
    if isinstance(tokenizer, str | PathLike):
        raise TypeError(f"tokenize takes a tokenizer, not its name: AutoTokenizer.from_pretrained({str(tokenizer)!r}).")
    dataset = examples.dataset.map(
        _columns,
        fn_kwargs={"tokenizer": tokenizer, "everything": everything, "template": training_template(tokenizer)},
        num_proc=processes,
        desc="Tokenizing",
    )
    left_out = int(np.sum(dataset.with_format("numpy")[_LEFT_OUT]))
    note = f"; {left_out:,} turns left out: {WHY_LEFT_OUT}" if left_out else ""
    return replace(examples, dataset=dataset.remove_columns(_LEFT_OUT), description=examples.description + note)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's form of the tokenizer's chat template, if it has one: it renders each turn the same, whatever follows."""
    try:
        return None if tokenizer.chat_template is None else get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):  # the template is not known, or fails on TRL's probes
        return None


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, everything: bool = False, template: str | None = None
) -> Tokens:
    """Tokenize an example; the loss falls on its answers, the tokens that end them included.

    A conversation is rendered up to each answer, once without and once with it: what the answer added counts. Marks of
    the template's own (`{% generation %}`) are neither needed nor read. Where a template renders an earlier answer
    differently once others follow (some drop old reasoning), that answer is left out, as is one that begins the
    conversation. Plain text gets the tokenizer's
    end-of-text token.

    Args:
        example: A row of `Examples.dataset`.
        tokenizer: Of the model.
        everything: Let the loss fall on every token. Of plain text without a prompt it always does.
        template: What renders `messages` whose answers count, in place of the tokenizer's own: `training_template`.

    Raises:
        PacaError: There is no chat template for messages or no end-of-text token for text, the template fails, or no
            answer can be found again.
    """
    conversation = "messages" in example or isinstance(example.get("prompt"), list)
    if conversation:
        text, spans, left_out = _conversation(example, tokenizer, everything, template)
    else:
        text, spans, left_out = _plain(example, tokenizer)
    everything = everything or "text" in example
    # A chat template writes the special tokens itself.
    ids, counts = _ids_and_mask(text, [] if everything else spans, tokenizer, add_special_tokens=not conversation)
    if not conversation and ids[-2:] == [tokenizer.eos_token_id] * 2 and ends_texts(tokenizer):
        del ids[-1], counts[-1]  # the text has its own
    labels = [token if everything or count else IGNORED for token, count in zip(ids, counts, strict=True)]
    return Tokens(ids, labels, left_out)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a plain text that is to be gone on with: without an end that the tokenizer puts after it."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ends_texts(tokenizer) else ids


def _columns(example: Example, **options: Any) -> dict[str, Any]:
    found = encode(example, **options)
    return {"input_ids": found.ids, "labels": found.labels, _LEFT_OUT: found.left_out}


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]], int]:
    if tokenizer.eos_token is None:
        raise PacaError(
            "The tokenizer has no end-of-text token, so a model trained on plain text would never learn to stop. Name "
            "one in train.eos_token."
        )
    prompt = example.get("prompt", "")
    text = prompt + (example["completion"] if "completion" in example else example["text"])
    text += "" if text.endswith(str(tokenizer.eos_token)) else str(tokenizer.eos_token)
    return text, [(len(prompt), len(text))], 0


def _conversation(
    example: Example, tokenizer: PreTrainedTokenizerBase, everything: bool, template: str | None
) -> tuple[str, list[tuple[int, int]], int]:
    """The rendered text, where in it the answers are, and how many could not be found."""
    if tokenizer.chat_template is None:
        raise PacaError(
            f"{example[ORIGIN]} holds messages, but the tokenizer has no chat template to render them with. "
            "Use an instruction-tuned model, or give this one a template: data.template of a run's YAML, or in Python "
            'paca.data.set_chat_template(tokenizer, "alpaca").'
        )
    messages, first = example.get("messages"), 0
    if messages is None:
        messages, first, template = example["prompt"] + example["completion"], len(example["prompt"]), None
    options = {
        "tools": json.loads(example["tools"]) if example.get("tools") else None,
        "chat_template": None if everything else template,
    }
    text = render(tokenizer, messages, example[ORIGIN], **options)
    if any(message.get("tool_calls") for message in messages):
        _require_tool_calls(text, messages, tokenizer, example[ORIGIN], options)
    answers = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    spans: list[tuple[int, int]] = []
    # An answer to nothing (the first message) cannot be told from the text that the template puts first.
    for index in [] if everything else filter(None, answers):
        before = render(tokenizer, messages[:index], example[ORIGIN], add_generation_prompt=True, **options)
        last = index + 1 == len(messages)
        after = text if last else render(tokenizer, messages[: index + 1], example[ORIGIN], **options)
        # Some templates open an answer otherwise than they render it, or end the last one otherwise than earlier ones.
        start, end = same_start(before, after), same_start(text, after)
        if end == len(after) or after.find(messages[index]["content"].strip() or after, start, end) >= 0:
            spans.append((start, end))
    if not spans and not everything:
        raise PacaError(
            f"{example[ORIGIN]}: no assistant turn can be found in the rendered conversation (it begins with one, or "
            "the chat template renders it differently each time). Give the example as prompt and completion."
        )
    return text, spans, 0 if everything else len(answers) - len(spans)


def _require_tool_calls(
    text: str, messages: list[Message], tokenizer: PreTrainedTokenizerBase, place: str, options: dict[str, Any]
) -> None:
    """Refuse a template for which the messages might as well call no tool: the model would learn to say nothing."""
    without = [{name: field for name, field in message.items() if name != "tool_calls"} for message in messages]
    try:
        dropped = render(tokenizer, without, place, **options) == text
    except PacaError:  # without its call, the template can't make sense of what a tool said
        return
    if dropped:
        raise PacaError(
            f"{place}: an answer calls a tool, and the chat template leaves tool_calls out, so the call would not be "
            f"learned. The template begins {str(tokenizer.chat_template).strip()[:60]!r}. Name one in data.template "
            "that renders tool_calls (chatml, or a Jinja file), or take such records out."
        )


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str, **options: Any) -> str:
    """The text of messages in the tokenizer's chat template; `place` says in errors where they are from."""
    texts = with_text_arguments(messages)
    if texts is not None and wants_text_arguments(tokenizer, options.get("chat_template")):
        messages = texts
    try:
        return _rendered(tokenizer, messages, **options)
    except _FAILURES as error:
        raise PacaError(f"{place}: the tokenizer's chat template cannot render these messages: {error}") from error


_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError)
_PROBE = {"probe": "qxz"}
_CALL = {"type": "function", "id": "123456789", "function": {"name": "probe", "arguments": _PROBE}}
_wants_text: dict[str, bool] = {}


def wants_text_arguments(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> bool:
    """Whether a chat template (the tokenizer's own by default) writes the arguments of a call down as they are, so that
    they must be JSON text; most write an object as JSON."""
    template = template or str(tokenizer.chat_template)
    if template not in _wants_text:
        call: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        messages: list[Message] = [{"role": "user", "content": "a"}, call]
        try:
            wants = str(_PROBE) in _rendered(tokenizer, messages, chat_template=template)
        except _FAILURES:
            try:
                wants = "qxz" in _rendered(tokenizer, with_text_arguments(messages), chat_template=template)
            except _FAILURES:
                wants = False
        _wants_text[template] = wants
    return _wants_text[template]


def as_template_wants(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """The examples with arguments of calls in the form that the tokenizer's template wants, for trainers that render
    them themselves."""
    if not examples.is_conversational or not wants_text_arguments(tokenizer):
        return examples

    def changed(example: Example) -> Example:
        lists = {name: value for name, value in example.items() if name in RENDERED and isinstance(value, list)}
        return {name: with_text_arguments(messages) or messages for name, messages in lists.items()}

    return replace(examples, dataset=examples.dataset.map(changed))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _ids_and_mask(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """Tokens, and whether each of them holds a character of a span."""
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=tokenizer.is_fast)
    ids = list(found["input_ids"])
    if tokenizer.is_fast:
        return ids, _mask_of(found["offset_mapping"], spans)

    def position(edge: int) -> int:
        """Where the tokens of the text up to `edge` part from those of the whole."""
        return same_start(ids, tokenizer(text[:edge], add_special_tokens=add_special_tokens)["input_ids"])

    edges = [(position(start), position(end)) for start, end in spans]
    return ids, [any(start <= index < end for start, end in edges) for index in range(len(ids))]


def _mask_of(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """The mask for tokens with offsets.

    A token that merges the last characters of the prompt with the first of the answer counts: it is part of what the
    model has to produce in place of the prompt's own tokens, and TRL and transformers count it as well. One that also
    holds what follows the answer does not.
    """
    mask = []
    previous_end = 0
    remaining = iter(spans)
    start, end = next(remaining, (0, 0))
    for token_start, token_end in offsets:
        # Byte-level tokenizers trim spaces from offsets: a token of spaces alone is left with nothing, and begins
        # where the one before it ended.
        begin = token_start if token_end > token_start else previous_end
        while begin >= end and (following := next(remaining, None)) is not None:
            start, end = following
        mask.append(begin < end and start < token_end <= end)
        previous_end = max(previous_end, token_end)
    return mask

"""The form of prompts: a chat template by name or from a file, and the token that ends a turn in it."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerBase

from paca.data.conversion import RENDERED
from paca.data.examples import Examples
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.jinja")))

_QUESTION, _ANSWER, _OTHER = "Is 7 a prime?", "Yes, 7 is one.", "42"  # no words of templates
_TURNS = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]

DEFAULT = "alpaca"
"""For tokenizers without a template: its turns end with the end-of-text token that every model has learned."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template, which is saved with it.

    A named one begins with the token that the tokenizer itself puts before each text, if it does.

    Args:
        tokenizer: Is changed.
        template: One of `NAMES`, or a file in Jinja.

    Raises:
        PacaError: There is no such template, it fails or leaves out the question, or no token ends an answer in it.
    """
    if template in NAMES:
        text = (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
        bos = tokenizer.bos_token_id
        if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]:
            text = "{{- bos_token -}}\n" + text
    elif Path(template).is_file():
        text = Path(template).read_text(encoding="utf-8-sig")  # editors on Windows put a byte order mark before it
    else:
        hint = did_you_mean(template, NAMES) or f" Named ones are {', '.join(NAMES)}."
        raise PacaError(f"data.template: there is no template and no file {template!r}.{hint}")
    before, tokenizer.chat_template = tokenizer.chat_template, text
    try:
        ended = end_of_turn(tokenizer) is not None
        left_out = _left_out(tokenizer)
    except PacaError as error:
        tokenizer.chat_template = before
        raise PacaError(f"data.template: {template!r} is no template that works. {error}") from error
    if left_out:
        tokenizer.chat_template = before
        raise PacaError(
            f"data.template: {template!r} leaves out what the {left_out[0]} says. Let it write the content of each "
            "message, as {{ message['content'] }} in a loop over messages."
        )
    if not ended:
        tokenizer.chat_template = before
        raise PacaError(
            f"data.template: in {template!r} no token of this tokenizer ends an answer, so the model would never learn "
            f"to stop. Use one that ends answers with its end-of-text token ({tokenizer.eos_token}), such as {DEFAULT}."
        )


def _left_out(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The roles whose words make no difference to what the chat template writes."""
    whole, roles = _rendered(tokenizer, _TURNS), [turn["role"] for turn in _TURNS]
    others = ([turn if turn["role"] != role else {**turn, "content": _OTHER} for turn in _TURNS] for role in roles)
    return [role for role, turns in zip(roles, others, strict=True) if _rendered(tokenizer, turns) == whole]


def unprompted_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template that ignores `add_generation_prompt` writes between a question and its answer: the model has
    to write it itself. Empty for others."""
    if tokenizer.chat_template is None:
        return ""
    try:
        prompts = [_rendered(tokenizer, _TURNS[:1], prompt=asked) for asked in (False, True)]
        whole = _rendered(tokenizer, _TURNS)
    except PacaError:  # a template that takes whole conversations alone
        return ""
    if prompts[0] != prompts[1] or not whole.startswith(prompts[0]) or _ANSWER not in whole:
        return ""
    return whole[len(prompts[0]) :].partition(_ANSWER)[0].strip()


def unused_fields(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Fields of messages that the chat template does not name, among the first 1,000 examples.

    Args:
        examples: Of any form.
        tokenizer: With the template that renders them.
    """
    found: dict[str, None] = {}
    for example in examples.dataset.select(range(min(1000, len(examples.dataset)))):
        lists = [value for name, value in example.items() if name in RENDERED and isinstance(value, list)]
        found.update((field, None) for messages in lists for message in messages for field in message)
        found.update({"tools": None} if lists and example.get("tools") else {})
    return [field for field in found if not re.search(rf"\b{re.escape(field)}\b", str(tokenizer.chat_template))]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template writes after an answer; None where it is text, or there is no template.

    Raises:
        PacaError: The template fails on a question and its answer.
    """
    if tokenizer.chat_template is None:
        return None
    text = _rendered(tokenizer, _TURNS)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    rest = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    return next((str(tokenizer.convert_ids_to_tokens(token)) for token in rest if token in special), None)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise PacaError(f"The chat template cannot render a question and its answer: {error}") from error

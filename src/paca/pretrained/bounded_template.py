"""Chat templates, which come with models and adapters of others: run in a process that can be ended.

A template is a program. It can't reach files (transformers runs it in jinja's sandbox), but loop for hours, or make a
text that fills the memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError
from paca.messages.shown import printable
from paca.tuner.bounded_process import BoundedProcess, TookTooLong, WorkFailed

LARGEST = 2**20
"""Characters of a template: those of public models have up to about 30,000."""
_PROGRAM = """
from transformers.utils.chat_template_utils import render_jinja_template
def work(request):
    return render_jinja_template(**request)[0][0]
"""


class EndlessTemplate(PacaError):
    """A chat template that takes too long, or too much memory."""


def check_template_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Try the chat template, if there is one, on one question, before it is run on many in this process.

    Raises:
        EndlessTemplate: It does not come to an end.
    """
    if tokenizer.chat_template is None:
        return
    try:
        conversation_text(tokenizer, [{"role": "user", "content": "Hello"}])
    except EndlessTemplate:
        raise
    except PacaError:  # it wants a conversation of another kind, and may like those to come
        return


def conversation_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """What the tokenizer's chat template makes of `messages` and definitions of `tools`, up to where the answer begins.

    Raises:
        PacaError: The template is too large, or refuses the conversation.
        EndlessTemplate: It does not come to an end.
    """
    where = printable(str(tokenizer.name_or_path), longest=300)
    try:
        template = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    except ValueError as error:  # several templates, and none of them the default
        raise PacaError(f"The chat template of {where} can't be used: {error}") from error
    if not isinstance(template, str) or len(template) > LARGEST:
        raise PacaError(f"The chat template of {where} is no text, or has over {LARGEST:,} characters.")
    special = json.loads(json.dumps(tokenizer.special_tokens_map, default=str))
    request = {"conversations": [list(messages)], "chat_template": template, "add_generation_prompt": True}
    if tools:
        request["tools"] = list(tools)
    try:
        text: str = renderer().ask({**special, **request})
    except TookTooLong:
        raise EndlessTemplate(
            f"The chat template of {where} does not come to an end for this conversation, or its text fills the "
            "memory. It is broken, or made to do harm: replace chat_template.jinja (or chat_template in "
            "tokenizer_config.json) by that of the base model."
        ) from None
    except WorkFailed as error:
        reason = str(error).removeprefix("TemplateError: ")
        raise PacaError(f"The model's chat template refuses this conversation: {printable(reason)}") from None
    except OSError as error:
        raise PacaError(f"The chat template of {where} can't be run: {error}") from error
    return text


@functools.cache
def renderer() -> BoundedProcess:
    """The process; it takes under a second to start, which may go on beside other work (`start`)."""
    return BoundedProcess(_PROGRAM)

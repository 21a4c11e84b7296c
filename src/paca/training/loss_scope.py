"""Which tokens count in the loss: the answers, unless the user asks for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.data import Examples, loss_settings, mark_assistant_turns
from paca.pretrained import load_tokenizer
from paca.training.run_config import ModelSection


@dataclass
class LossScope:
    """Examples made ready for their loss, and the fields of SFTConfig that go with them."""

    train: Examples
    eval: Examples | None
    settings: dict[str, bool]
    """Values of ``completion_only_loss`` and ``assistant_only_loss``."""
    description: str
    """For people."""


def tokenizer_of(model: ModelSection, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with the template that `train.chat_template_path` names, as TRL will give it.

    Raises:
        PacaError: It can't be read.
    """
    if model.tokenizer is not None:
        tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    else:
        tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    path = settings.get("chat_template_path")
    if path is None:
        return tokenizer
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        tokenizer.chat_template = load_tokenizer(path).chat_template
    return tokenizer


def scope_loss(
    train: Examples, held_out: Examples | None, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> LossScope:
    """Let the loss fall on the answers, where there are any and the user did not ask for the whole text.

    Args:
        train: The training examples.
        held_out: The held-out examples.
        tokenizer: Of the model.
        settings: The section ``train`` as the user gave it.

    Raises:
        PacaError: The tokenizer has no chat template for messages, or no answer can be found.
    """
    given = {
        name: settings[name]
        for name in ("completion_only_loss", "assistant_only_loss")
        if settings.get(name) is not None
    }
    deciding = "assistant_only_loss" if "messages" in train.dataset.column_names else "completion_only_loss"
    if given.get(deciding) is False:
        return LossScope(train, held_out, given, "every token")
    train = mark_assistant_turns(train, tokenizer)
    held_out = None if held_out is None else mark_assistant_turns(held_out, tokenizer)
    found = loss_settings(train, tokenizer)
    if "input_ids" in train.dataset.column_names:  # masked already, which is what assistant_only_loss: true asks for
        return LossScope(train, held_out, found, "the assistant's turns")
    found |= given
    answers = {"assistant_only_loss": "the assistant's turns", "completion_only_loss": "the completions"}
    scopes = [words for name, words in answers.items() if found[name]]
    return LossScope(train, held_out, found, " within ".join(scopes) or "every token")

"""How a conversation with a loaded model begins: with which messages, in which form, and with whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from paca.lean.float32_products import fastest_products
from paca.messages.errors import PacaError
from paca.messages.shown import shown
from paca.pretrained.adapter_folder import base_of_whole, form_of_training, system_of_training
from paca.pretrained.bounded_template import conversation_text
from paca.pretrained.changed_base import left_on
from paca.pretrained.generation import LoadedModel, Message


def opening(loaded: LoadedModel, system: str | None) -> list[Message]:
    """The messages that a conversation starts with: none, or the system message.

    Args:
        loaded: The model.
        system: Its text; empty for none. None is the one that all of the training data began with, if there is one: a
            model that is asked without it answers as if it had hardly been trained.

    Raises:
        PacaError: There is one, and the model has no place for it.
    """
    if system and loaded.tokenizer.chat_template is None:
        raise PacaError("This model has no chat template, so there is no place for a system message.")
    text = _system_of_training(loaded) if system is None else system
    return [{"role": "system", "content": text}] if text else []


def told_of_system(loaded: LoadedModel, system: str | None) -> str | None:
    """What a person should know of an `opening` that was not asked for."""
    text = _system_of_training(loaded) if system is None else None
    return f"Asked with the system message of the training data ({shown(text)})." if text else None


def needs_system(trained: Path) -> str | None:
    """What whoever asks the model elsewhere should know: the system message that all of its training data had."""
    text = system_of_training(trained)
    return (
        None if text is None else f"All training data began with the system message {shown(text)}: begin with it too."
    )


def _system_of_training(loaded: LoadedModel) -> str | None:
    return None if loaded.tokenizer.chat_template is None else system_of_training(_trained(loaded))


def check_tools(loaded: LoadedModel, tools: Sequence[dict[str, Any]]) -> None:
    """See that the model is told of `tools`.

    Raises:
        PacaError: Its chat template leaves them out, or it has none.
    """
    asked = [{"role": "user", "content": "Hello"}]
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template is None or conversation_text(tokenizer, asked, tools) == conversation_text(
        tokenizer, asked
    ):
        how = "has no chat template" if tokenizer.chat_template is None else "has a chat template that writes no tools"
        raise PacaError(f"This model {how}, so it would not be told of --tools. Leave them out.")


def unknown_form(loaded: LoadedModel, base: bool = False) -> str | None:
    """What a person should know of a model of which no chat template says how to ask, or perhaps a wrong one.

    `base`: asked is the model without its adapter.
    """
    if loaded.tokenizer.chat_template is not None:
        if base:
            return None
        if _trained_in(loaded) == "texts":
            return "It was trained on texts as they stand, but is asked in the chat template of its model."
        if loaded.adapter is not None and not (loaded.adapter / "tokenizer_config.json").is_file():
            return (
                "No tokenizer is saved with this adapter, so the form that it was trained in is unknown. It is asked "
                f"in the chat template of {loaded.base}."
            )
        return None
    unknown = "This model has no chat template"
    if loaded.adapter is not None:
        unknown = (
            "No chat template is saved with this adapter: it was trained on texts as they stand, or in a form that is "
            "unknown"
        )
    return f"{unknown}. It continues each text as it stands, without the ones before."


def other_form(loaded: LoadedModel, in_template: bool) -> str | None:
    """What a person should know of tasks that are asked in another form than the run trained its model in."""
    trained = _trained_in(loaded)
    if trained == "template" and not in_template:
        return "Asked in plain text. The run trained in a chat template: --chat-template asks in it."
    if trained == "texts" and in_template:
        return "Asked in the chat template. The run trained on texts as they stand."
    return None


def _trained_in(loaded: LoadedModel) -> str | None:
    return form_of_training(_trained(loaded))


def _trained(loaded: LoadedModel) -> Path:
    return loaded.adapter or Path(loaded.base)


def speaker(loaded: LoadedModel, base: bool) -> str:
    """Who answers: the model with its adapter, or with `base` without it."""
    return loaded.base if base or loaded.adapter is None else f"{loaded.base} with {loaded.adapter}"


@contextmanager
def answering(loaded: LoadedModel, base: bool) -> Iterator[None]:
    """Answer within this, with `base` without the adapter.

    Raises:
        PacaError: There is no adapter to leave out, or another model than the base is left without it.
    """
    if base and loaded.adapter is None:
        trained_from = base_of_whole(loaded.base)
        if trained_from is None:
            raise PacaError(f"{loaded.base} is a plain model: it has no adapter that could be left out.")
        raise PacaError(
            f"{loaded.base} is a whole model that its run trained: it has no adapter that could be left out. Give the "
            f"model that it was trained from in its place, {trained_from}, or beside it: --beside {trained_from}"
        )
    model = loaded.model
    if base and (changed := left_on(model)) is not None:
        raise PacaError(
            f"{loaded.adapter}: without the adapter another model than {loaded.base} is left, as {changed}. Ask "
            f"{loaded.base} itself: give it in the place of the adapter, or --beside {loaded.base}"
        )
    with fastest_products(model.device, model.dtype), model.disable_adapter() if base else nullcontext():
        yield

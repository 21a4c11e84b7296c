"""The form in which a run's model reads its data: the chat template, and the token that ends an answer."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paca.data import Examples, end_of_turn, set_chat_template
from paca.data.chat_template import DEFAULT, NAMES
from paca.messages.errors import PacaError, about
from paca.pretrained import load_tokenizer
from paca.pretrained.adapter_tokenizer import saved_tokenizer
from paca.pretrained.ends_of_texts import ends_texts
from paca.training.config.run_config import ModelSection, RunConfig


def tokenizer_of(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, in the form that its config names.

    Raises:
        PacaError: It can't be read, or is none for this form.
    """
    model = config.model
    if model.tokenizer is not None:
        with about("model.tokenizer"):
            tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    elif (saved := tokenizer_of_adapter(model)) is not None:
        tokenizer = saved
    else:
        with about("model.name"):
            tokenizer = load_tokenizer(model.name, model.revision, model.trust_remote_code)
    give_form(tokenizer, config)
    return tokenizer


def tokenizer_of_adapter(model: ModelSection) -> PreTrainedTokenizerBase | None:
    """The one saved with the adapter that is trained on, with the form in which that learned; None where there is none,
    and where `model.tokenizer` names another.

    Raises:
        PacaError: It is broken.
    """
    if model.adapter is None or model.tokenizer is not None:
        return None
    with about("model.adapter"):
        return saved_tokenizer(Path(model.adapter))


def give_form(tokenizer: PreTrainedTokenizerBase, config: RunConfig, train: Examples | None = None) -> None:
    """Give a tokenizer the template and the end-of-text token that the config names, which are saved with it.

    Without its template, where `train` holds prompts that are texts: whoever asks the trained model asks in the form of
    training then. Plain documents leave it, as they have no form to ask in.

    Raises:
        PacaError: There is no such template or token.
    """
    end = config.train.get("eos_token")
    if end is not None and end not in tokenizer.get_vocab():
        raise PacaError(f"train.eos_token is {end!r}, which is no token of this tokenizer. Name one that it has.")
    tokenizer.eos_token = end or tokenizer.eos_token
    if config.data.template is not None:
        set_chat_template(tokenizer, config.data.template)
    elif train is not None and _asks_in_plain_text(config, train):
        tokenizer.chat_template = None


def _asks_in_plain_text(config: RunConfig, train: Examples) -> bool:
    """Whether the model learns to answer prompts that are texts. A reward model answers nothing."""
    prompts = "prompt" in train.dataset.column_names and not train.is_conversational
    return prompts and config.train.get("trainer") != "reward"


def choose_form(config: RunConfig, train: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decide what the config leaves open, and write it there: `data.template`, `train.eos_token`.

    Args:
        config: Of the run.
        train: The training data.
        tokenizer: From `tokenizer_of`; gets what is decided.

    Returns:
        The form in words, and why.

    Raises:
        PacaError: The data has no place for the template that the config names.
    """
    asked = config.data.template
    if not train.is_conversational:
        if asked is not None:
            raise PacaError(
                f"data.template renders messages, but {train.source} holds plain text (form {train.format}), which is "
                "trained as it stands. Leave data.template out, or name the columns question and answer."
            )
        if _asks_in_plain_text(config, train) and tokenizer.chat_template is not None:
            return (
                "none: the texts are trained as they stand, with the end-of-text token after each; the model's own "
                "template is left out, and not saved. Columns named question and answer are put into it"
            )
        return "none: the texts are trained as they stand, and the end-of-text token after each"
    words = "the tokenizer's own" if asked is None else f"{asked} (data.template)"
    if tokenizer.chat_template is None:
        others = ", ".join(name for name in NAMES if name != DEFAULT)
        words = f"{DEFAULT}, as the tokenizer has none; data.template names another ({others}, or a Jinja file)"
        config.data.template = DEFAULT
        set_chat_template(tokenizer, DEFAULT)
    end = end_of_turn(tokenizer)
    if end is None:
        return f"{words}; no token ends an answer in it, so the model may not learn to stop"
    if end != tokenizer.eos_token and "eos_token" not in config.train:
        # TRL adds it to what ends a generation, and it is saved as the tokenizer's.
        config.train["eos_token"] = tokenizer.eos_token = end
    return f"{words}; {end} ends an answer"


def trains_everything(config: RunConfig, train: Examples) -> bool:
    """Whether the loss falls on every token, because the user asks for it or the data has no answers apart."""
    columns = train.dataset.column_names
    return "text" in columns or config.train.get(_loss_key(train)) is False


def _loss_key(train: Examples) -> str:
    """TRL's setting for data of this form."""
    return "assistant_only_loss" if "messages" in train.dataset.column_names else "completion_only_loss"


def describe_loss(config: RunConfig, train: Examples) -> str:
    """Which tokens count in the loss, in words."""
    if trains_everything(config, train):
        return "every token"
    words = "the assistant's turns" if "messages" in train.dataset.column_names else "the completions"
    key = _loss_key(train)
    other = {"assistant_only_loss": "completion_only_loss", "completion_only_loss": "assistant_only_loss"}[key]
    if config.train.get(other) is False:
        return f"{words} (train.{other} tells nothing of this form of data, train.{key} does)"
    return words


def check_prompts_stay_open(config: RunConfig, train: Examples) -> None:
    """Refuse a tokenizer that ends each text, where TRL makes the tokens of plain prompts: an answer follows them.

    Raises:
        PacaError: It is one, and the data is no conversation.
    """
    tokenizer = tokenizer_of(config)
    if not train.is_conversational and ends_texts(tokenizer):
        raise PacaError(
            f"The tokenizer puts {tokenizer.eos_token} after every text, so a prompt would end before it is answered. "
            "Take that out of the tokenizer's files (add_eos_token), or let a chat template render the prompts, which "
            "writes such tokens itself: data.columns: {question: prompt}."
        )

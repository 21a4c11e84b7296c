"""The model that a run's config names, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from paca.messages.errors import PacaError, about
from paca.messages.shown import shown
from paca.pretrained import load_config
from paca.pretrained.loading import Outline, check_folder_is_whole, labels_of, modules_made_anew
from paca.pretrained.missing_weights import heads_of
from paca.pretrained.purpose import classifier_in
from paca.training.config.run_config import ModelSection, RunConfig


def outline_of(named: ModelSection, auto_class: Any, labels: Sequence[str] | None) -> Outline:
    """Its configuration and its modules without weights; arguments and errors as in `paca.pretrained.load_config`."""
    with about("model.name"):
        outline = load_config(named.name, named.dtype, named.revision, named.trust_remote_code, auto_class, labels)
        if auto_class is AutoModelForCausalLM:
            _check_causal(outline.model)
            if getattr(outline.config, "quantization_config", None) is None:
                check_folder_is_whole(named.name, named.trust_remote_code)
    set_attention(outline.model, named)
    return outline


def set_attention(model: PreTrainedModel, named: ModelSection) -> None:
    """Let a model compute attention as the config names it, in transformers' word for it; null changes nothing.

    Raises:
        PacaError: There is none of the name, the model has no choice, or a package for it is missing.
    """
    implementation = named.attn_implementation
    if implementation is None:
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise PacaError(f"model.attn_implementation: {str(error).strip()}") from error
    if model.config._attn_implementation != implementation:
        raise PacaError(
            f"model.attn_implementation: {type(model).__name__} always computes attention by "
            f"{model.config._attn_implementation!r}. Leave it out."
        )


def _check_causal(model: nn.Module) -> None:
    """Refuse an encoder as a language model: transformers makes it one, and its tokens see those that they foretell."""
    config: Any = model.config
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal:
        raise PacaError(
            f"It is an encoder ({config.model_type}), in which each token sees those behind it, so that it learns to "
            "copy them. Give a model that writes text, or train.trainer: classification."
        )


def train_heads(config: RunConfig, model: nn.Module, new: Sequence[str] = ()) -> None:
    """Have what is new in a classifier trained whole, beside the adapter of `config`, if it has one: its heads, and
    what its checkpoint lacks besides, such as a pooler (`new`, from `new_modules`)."""
    if config.method != "full":
        whole = {*(config.adapter.get("modules_to_save") or ()), *heads_of(model), *new}
        config.adapter["modules_to_save"] = sorted(whole)


def check_same_labels(named: ModelSection, labels: Sequence[str] | None) -> None:
    """Refuse data of other labels than those of the classifier's adapter that is trained on (`model.adapter`).

    Raises:
        PacaError: With both.
    """
    had = None if named.adapter is None or labels is None else classifier_in(named.adapter)
    if had is not None and had.labels != labels:
        raise PacaError(
            f"The adapter in {named.adapter} tells apart {shown(had.labels)}, and the data {shown(labels)}. Train on "
            "with data that has each of its labels, or begin anew without model.adapter."
        )


def in_models_order(names: list[str], named: ModelSection) -> list[str]:
    """Labels in the order of a classifier's outputs, if it tells apart just these: its head knows them by their places.

    Args:
        names: Of the data's labels.
        named: The model that is trained, or whose adapter is.

    Raises:
        PacaError: The model can't be found.
    """
    if named.adapter is not None:
        had = classifier_in(named.adapter)
        known = None if had is None else had.labels
    else:
        with about("model.name"):
            known = labels_of(named.name, named.revision, named.trust_remote_code)
    return known if known is not None and sorted(known) == sorted(names) else names


def new_modules(named: ModelSection, auto_class: Any, labels: Sequence[str], *, fetch: bool) -> list[str]:
    """`modules_made_anew` of the model; arguments and errors as there."""
    with about("model.name"):
        return modules_made_anew(named.name, named.revision, named.trust_remote_code, auto_class, labels, fetch=fetch)

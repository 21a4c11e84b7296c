"""Settings for writing texts: those of `generate`, and a checkpoint's that transformers reads but refuses to save."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LEARNED_CACHES = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's methods that learn keys and values of each layer."""


def make_savable(model: Any, name: str) -> None:
    """Take out what `generation_config.json` of the checkpoint `name` says without effect on `generate`, such as a
    temperature without `do_sample`, and say so: else transformers won't save a model with other ends of texts.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        unused = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        for setting in unused:
            setattr(settings, setting, None)
        listed = ", ".join(unused)
        logger.warning("In generation_config.json of %r these have no effect, and are not saved: %s.", name, listed)


def sampling_settings(model: Any, tokenizer: PreTrainedTokenizerBase, temperature: float) -> dict[str, Any]:
    """Arguments of `generate`: how tokens are chosen, and which of them end an answer."""
    # Checkpoints disagree on which of the two names the token that ends a turn; either one ends an answer.
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    ends = (ends | {tokenizer.eos_token_id}) - {None}
    settings: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "do_sample": temperature > 0}
    if ends:
        settings["eos_token_id"] = sorted(ends)
    if learns_a_prompt(model):
        # With one, PEFT 0.21 loses learned tokens after the first answered one; keys and values are learned in it.
        settings["use_cache"] = learns_a_cache(model)
    if temperature > 0:
        return settings | {"temperature": temperature}
    # The likeliest token each time: a checkpoint's own penalties would choose others, of digits too.
    likeliest = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    likeliest |= {"min_length": 0, "encoder_no_repeat_ngram_size": 0}
    unused = {"temperature": None, "top_p": None, "top_k": None, "min_new_tokens": None}  # would be warned about
    unused |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"))
    unused |= dict.fromkeys(("guidance_scale", "exponential_decay_length_penalty"))
    return settings | likeliest | unused


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """A block in which `generate` of a model that learns tokens keeps no cache, whatever it is told."""
    if not learns_a_prompt(model) or learns_a_cache(model):
        yield
        return
    generate = model.generate
    model.generate = lambda *args, **given: generate(*args, **{**given, "use_cache": False})
    try:
        yield
    finally:
        del model.generate


def learns_a_prompt(model: Any) -> bool:
    """Whether a model puts learned tokens before its input, as prompt tuning does."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def learns_a_cache(model: Any) -> bool:
    """Whether what it puts there are keys and values of each layer, as prefix tuning does, rather than tokens."""
    return getattr(getattr(model, "active_peft_config", None), "peft_type", None) in LEARNED_CACHES


def find_learned_cache(model: Any) -> None:
    """Let `generate` of a model that learns keys and values answer with them, as its forward pass reads them.

    PEFT 0.21 looks for the cache under `past_key_values`. transformers 5.24 calls it `cache`, so that PEFT finds none,
    and what was learned is lost. Positions are counted from the cache's length then, in padding too, as in training.

    Args:
        model: With an adapter of any kind, or without; nothing is done with another method.
    """
    if not learns_a_cache(model) or not hasattr(model, "base_model_prepare_inputs_for_generation"):
        return
    prepare = model.base_model_prepare_inputs_for_generation

    @functools.wraps(prepare)
    def with_its_older_name(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        if not model._adapters_disabled:  # PEFT leaves this to the base model after the first answer
            inputs.pop("position_ids", None)
            inputs["past_key_values"] = inputs.pop("cache", None)
        return inputs

    model.base_model_prepare_inputs_for_generation = with_its_older_name

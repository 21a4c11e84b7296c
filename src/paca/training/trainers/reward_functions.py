"""The rewards of GRPO by name: ours, TRL's, a function of the user's, or a reward model."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl.rewards
from transformers import AutoModelForSequenceClassification
from trl.import_utils import is_math_verify_available

from paca.data import Examples
from paca.data.conversion import ORIGIN
from paca.messages.errors import PacaError
from paca.messages.install import how_to_install
from paca.messages.nearest import did_you_mean
from paca.messages.shown import shown
from paca.pretrained import load_pretrained
from paca.pretrained.adapter_folder import ADAPTER_CONFIG
from paca.pretrained.answer_pattern import extract_answers
from paca.pretrained.generation import load_saved
from paca.pretrained.out_of_memory import is_out_of_memory
from paca.pretrained.purpose import classifier_in

BY_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
BUILT_IN = ("exact_match", *BY_TRL)
_FROM_THE_TRAINER = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
_OURS = {"prompt", ORIGIN}
"""Columns that reading the data has made."""
_WITHHELD = {"prompt": "prompts", "completion": "completions"}
"""Columns that TRL does not give to rewards, and what it gives them."""


@dataclass(frozen=True)
class Reward:
    """Something that says how good an answer is."""

    name: str
    """As the user wrote it."""
    function: Callable[..., list[float]] | None
    """As TRL calls it; None for a reward model."""


class ExactMatch:
    """1 for an answer that is the record's `answer`, else 0."""

    __name__ = "exact_match"

    def __init__(self, pattern: str | None) -> None:
        self.pattern = pattern

    def __call__(self, completions: list[Any], answer: list[Any], **kwargs: Any) -> list[float]:
        """Args:
        completions: Texts, or lists of one message.
        answer: For each the right answer, alone or in a text in which the pattern finds it.
        """
        written, right = [text_of(completion) for completion in completions], [str(one) for one in answer]
        key = "train.answer_pattern"
        found, references = extract_answers(written, self.pattern, key), extract_answers(right, self.pattern, key)
        triples = zip(found, references, extract_answers(right, None), strict=True)
        return [float(one == (plain if reference is None else reference)) for one, reference, plain in triples]


def text_of(completion: str | list[dict[str, str]]) -> str:
    """What the model wrote."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def find_rewards(settings: Mapping[str, Any]) -> list[Reward]:
    """What `train.reward_funcs` names.

    Raises:
        PacaError: A name stands for nothing, or a function cannot be imported.
    """
    names = settings["reward_funcs"]
    return [_find(name, settings.get("answer_pattern")) for name in ([names] if isinstance(names, str) else names)]


def _find(name: str, pattern: str | None) -> Reward:
    if name == "exact_match":
        return Reward(name, ExactMatch(pattern))
    if name in BY_TRL:
        if name != "think_format_reward" and not is_math_verify_available():
            needs = f"train.reward_funcs: {name} needs the package math-verify."
            raise PacaError(f"{needs} {how_to_install(None, 'math-verify')}")
        return Reward(name, getattr(trl.rewards, name))
    module, colon, function = name.partition(":")
    if colon:
        return Reward(name, _imported(name, module, function))
    if "/" not in name and not Path(name).exists():
        raise PacaError(
            f"train.reward_funcs: there is no {name!r}.{did_you_mean(name, BUILT_IN)} Built in are "
            f"{', '.join(BUILT_IN)}; others are package.module:function, or a reward model's folder or hub id."
        )
    adapted = any((Path(name) / part / ADAPTER_CONFIG).is_file() for part in ("", "adapter"))
    if adapted and classifier_in(name) is None:
        raise PacaError(
            f"train.reward_funcs: {name} holds an adapter of a language model, which gives no reward. Give a run of "
            "train.trainer: reward."
        )
    return Reward(name, None)


def reward_files(settings: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The name of each function of the user's, with the file of the module that the name gives; and of each reward
    model in a folder, with the files of its weights and settings (of an adapter not those of its base model)."""
    names = settings.get("reward_funcs") or []
    for name in [names] if isinstance(names, str) else names:
        module, colon, function = name.partition(":")
        if colon:
            _imported(name, module, function)
            file = getattr(sys.modules[module], "__file__", None)
            if file is not None:
                yield name, Path(file)
        elif Path(name).is_dir():
            run = [part for part in (Path(name, "adapter"), Path(name, "model")) if part.is_dir()]
            for folder in run or [Path(name)]:
                for path in sorted(folder.iterdir()):
                    if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
                        yield name, path


def _imported(name: str, module: str, function: str) -> Callable[..., list[float]]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, where a program's own folder stands instead
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PacaError(
            f"train.reward_funcs: {name} can't be imported: {error}. Give package.module:function, of a package that "
            f"is installed or of a file in the working folder, {os.getcwd()}."
        ) from error
    if not callable(found):
        raise PacaError(f"train.reward_funcs: {name} is no function, but {type(found).__name__}.")
    return found if inspect.iscoroutinefunction(found) else _checked(name, found)


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., list[float]]:
    """The function; one error says what is wrong where it fails, or gives something else than numbers."""

    @functools.wraps(function)
    def reward(*args: Any, completions: list[Any], **kwargs: Any) -> list[float]:
        try:
            found = function(*args, completions=completions, **kwargs)
        except Exception as error:  # whatever the user's code raises
            if is_out_of_memory(error):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise PacaError(
                f"train.reward_funcs: {name} fails with {type(error).__name__}: {error} ({place.filename}, line "
                f"{place.lineno}). Correct the function."
            ) from error
        try:
            rewards = list(found)
        except TypeError:  # one number for all, or nothing
            rewards = []
        wrong = [value for value in rewards if value is not None and not _is_finite(value)]
        if wrong or len(rewards) != len(completions):
            given = f"{wrong[0]!r} among them" if wrong else f"{len(rewards)} values" if rewards else shown(found)
            raise PacaError(
                f"train.reward_funcs: {name} must return a number or None for each of {len(completions)} completions; "
                f"it returned {given}. Correct the function."
            )
        return rewards

    return reward


def _is_finite(value: Any) -> bool:
    """Whether it is a number that says something: TRL takes NaN for no reward, and by an infinite one nothing in its
    group is learned."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a text, a tensor of several, more than a float holds
        return False


def check_columns(rewards: list[Reward], examples: Examples) -> None:
    """Refuse data that lacks what a function must be given.

    Raises:
        PacaError: Names the function, the column, and the first record where that is empty.
    """
    dataset = examples.dataset
    if any(reward.function for reward in rewards) and (
        taken := sorted(_FROM_THE_TRAINER.intersection(dataset.column_names))
    ):
        raise PacaError(
            f"{examples.source} has the column {taken[0]}, a name under which TRL gives rewards something else. Rename "
            "it there, and in the reward that reads it."
        )
    for reward in rewards:
        if reward.function is None:
            continue
        if reward.name in BY_TRL and not examples.is_conversational:
            raise PacaError(
                f"train.reward_funcs: {reward.name} reads answers that are messages, and the prompts of "
                f"{examples.source} are text. Give them as messages, or as the column question."
            )
        parameters = inspect.signature(reward.function).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            raise PacaError(
                f"train.reward_funcs: {reward.name} takes {', '.join(parameters) or 'nothing'}, and TRL gives it the "
                "prompts, the data's columns and more besides, by their names. Add **kwargs to its parameters."
            )
        for name, parameter in parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if not needed or name in _FROM_THE_TRAINER:
                continue
            if name in _WITHHELD:
                raise PacaError(
                    f"train.reward_funcs: {reward.name} asks for {name}, which TRL does not give: it gives "
                    f"{_WITHHELD[name]}, the model's. Give that parameter another name, and the data's column too."
                )
            if name not in dataset.column_names:
                raise PacaError(
                    f"train.reward_funcs: {reward.name} needs the column {name}, which {examples.source} has not. It "
                    f"has: {', '.join(column for column in dataset.column_names if column not in _OURS)}."
                )
            empty = next((o for o, v in zip(dataset[ORIGIN], dataset[name], strict=True) if v is None), None)
            if empty is not None and reward.name in BUILT_IN:
                raise PacaError(f"{empty}: {name} is missing, which the reward {reward.name} needs.")


def load_reward_models(rewards: list[Reward]) -> dict[str, list[Any]]:
    """The arguments of `GRPOTrainer` that are rewards.

    Raises:
        PacaError: A reward model can't be loaded, or has not one output.
    """
    loaded = [(reward.function, None) if reward.function else _load(reward.name) for reward in rewards]
    return {
        "reward_funcs": [function for function, _ in loaded],
        "reward_processing_classes": [tokenizer for _, tokenizer in loaded],
    }


def _load(name: str) -> tuple[Any, Any]:
    if Path(name).is_dir() and classifier_in(name) is not None:
        saved = load_saved(name)
        model = saved.model if saved.adapter is None else saved.model.merge_and_unload()
        tokenizer = saved.tokenizer
    else:
        pretrained = load_pretrained(name, auto_class=AutoModelForSequenceClassification)
        model, tokenizer = pretrained.model, pretrained.tokenizer
    if getattr(model.config, "num_labels", None) != 1:
        raise PacaError(
            f"train.reward_funcs: {name} has {getattr(model.config, 'num_labels', 'no')} outputs; a reward model has "
            "one. Train it with train.trainer: reward."
        )
    return model.eval(), tokenizer

"""`train.trainer: grpo`: a language model answers, and learns from what reward functions say of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from paca.data.conversion import ORIGIN
from paca.data.formats import Example
from paca.data.sample import take_sample
from paca.data.tokens import IGNORED, Tokens, render
from paca.messages.errors import PacaError
from paca.messages.processes import launched_processes
from paca.pretrained.answer_pattern import check_pattern
from paca.pretrained.generation_settings import learns_a_cache, learns_a_prompt
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import RunConfig
from paca.training.prompt_form import check_prompts_stay_open, tokenizer_of
from paca.training.trainers.kind import RunData, TrainerKind, read_texts
from paca.training.trainers.reference import load_reference, told_of_reference
from paca.training.trainers.reward_functions import BUILT_IN, check_columns, find_rewards, load_reward_models
from paca.training.trainers.weighed_batches import WeighsBatches

_OTHER_GENERATORS = (
    *("use_vllm", "use_transformers_paged", "use_transformers_continuous_batching"),
    *("cache_implementation", "generation_kwargs", "cast_lm_head_to_fp32"),
)
"""Settings by which answers are made in other ways than by `generate` with a cache that grows, or take other memory."""


class _GrpoTrainer(WeighsBatches, GRPOTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer`, whose means over held-out data are over examples."""


class Grpo(TrainerKind):
    """TRL's `GRPOTrainer`."""

    name = "grpo"
    arguments = GRPOConfig
    trainer = _GrpoTrainer
    own_keys: ClassVar[dict[str, Any]] = {
        "reward_funcs": str | list[str],
        "answer_pattern": str | None,
        "eos_token": str | None,
    }
    learning_rate = 1e-5  # ten times TRL's, which is for training in full
    score = "reward"
    lengths_known = False
    probed = False

    def check(self, settings: Mapping[str, Any], origins: Origins) -> None:
        """There are rewards, each with its weight where weights are given, and the pattern is one."""
        if not settings.get("reward_funcs"):
            raise PacaError(
                f"{origins.of('train')}: train.trainer: grpo needs train.reward_funcs, one or a list of: "
                f"{', '.join(BUILT_IN)}, package.module:function, or a reward model (a run of train.trainer: reward, a "
                "folder or a hub id)."
            )
        functions, weights = settings["reward_funcs"], settings.get("reward_weights")
        count = 1 if isinstance(functions, str) else len(functions)
        if weights is not None and len(weights) != count:
            raise PacaError(
                f"{origins.of('train.reward_weights')}: train.reward_weights has {len(weights)} "
                f"number{'s' * (len(weights) != 1)}, and train.reward_funcs {count}: one for each was expected, in "
                "their order."
            )
        check_pattern(settings.get("answer_pattern"), "train.answer_pattern")

    def check_planned(self, settings: Mapping[str, Any]) -> None:
        """Answers are made here, in whole groups, by transformers, up to a known length; rewards need no models."""
        _check_groups(settings, 1)
        elsewhere = [name for name in _OTHER_GENERATORS if settings.get(name)]
        models = [reward.name for reward in find_rewards(settings) if reward.function is None]
        if elsewhere:
            why = f"with train.{elsewhere[0]} answers take other memory"
        elif models:
            why = f"the reward model {models[0]} is held beside it"
        elif settings["max_completion_length"] is None:
            why = "train.max_completion_length is null, so answers have no limit"
        else:
            return
        raise PacaError(
            f"The memory of this run is not foretold: {why}. Change that key (--set), and add what it takes."
        )

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Held-out batches hold whole groups of answers to a prompt. The trainer counts tokens itself."""
        generations = settings.get("num_generations", 8)
        return {
            "num_generations": generations,
            "per_device_eval_batch_size": settings.get("num_generations_eval", generations),
            "max_completion_length": 256,
            "include_num_input_tokens_seen": "no",
        }

    def read(self, config: RunConfig) -> RunData:
        """Prompts, and whatever the reward functions need."""
        train, held_out, template = read_texts(config, "prompts")
        check_prompts_stay_open(config, train)
        rewards = find_rewards(config.train)
        for examples in (train, held_out):
            if examples is not None:
                check_columns(rewards, examples)
        names = ", ".join(reward.name for reward in rewards)
        return RunData(train, held_out, f"the model's own answers, by {names}", template)

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """With a sample of the prompts as tokens; the answers that are made at a time must be whole groups.

        Raises:
            PacaError: They are not.
        """
        _check_groups(config.train, launched_processes())
        tokenizer = tokenizer_of(config)
        sample = take_sample(data.train, tokenizer, partial(_prompt, tokenizer))
        return replace(data, sample=sample.followed_by(lambda _: [("… the model's own answer", True)]))

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """With the reward functions, and the models among them loaded. TRL loads a reference itself: let it be ours."""
        rewards = load_reward_models(find_rewards(config.train))
        if config.method != "full" or not parts["args"].beta:
            trainer: Any = super().make(config, adapter, data, **rewards, **parts)
            if learns_a_prompt(trainer.model):
                # As in `paca.pretrained.generation_settings`.
                trainer.generation_config.use_cache = learns_a_cache(trainer.model)
            return trainer
        reference = load_reference(config, parts["model"], parts["processing_class"])
        with patch.object(grpo_trainer, "create_model_from_path", lambda *_, **__: reference):
            return super().make(config, adapter, data, **rewards, **parts)

    def lines(self, config: RunConfig) -> list[tuple[str, str]]:
        """What the model is held against, where `beta` asks for it."""
        return told_of_reference(config) if config.train.get("beta") else []

    def resuming(self, arguments: Any, state: TrainerState) -> str:
        """Checkpoints don't hold answers: the trainer makes new ones for the rest of a generation that was cut."""
        text, each = super().resuming(arguments, state), arguments.steps_per_generation * arguments.num_iterations
        if state.global_step * arguments.gradient_accumulation_steps % each == 0:
            return text
        return f"{text} It stopped between two generations: answers that were not yet learned from are made anew."

    def lengths(self, dataset: Dataset) -> list[int]:
        """Refused.

        Raises:
            PacaError: Always: the answers are not there yet.
        """
        raise PacaError("--probe does not go with train.trainer: grpo, whose answers are yet to be made. Leave it out.")

    def batches(self, examples: int, train: Mapping[str, Any], processes: int) -> int | None:
        """They are of answers: `num_generations` to a prompt, made for `steps_per_generation` batches at a time."""
        per_batch = train["per_device_train_batch_size"] * processes
        answers = answers_at_a_time(train, processes)
        blocks = examples // max(1, answers // train["num_generations"])
        return blocks * train.get("num_iterations", 1) * (answers // per_batch)

    def check_batches(self, examples: int, train: Mapping[str, Any], processes: int) -> None:
        """Refuse fewer prompts than answers are made to at a time.

        Raises:
            PacaError: Names the settings that make it so.
        """
        answers = answers_at_a_time(train, processes)
        if self.batches(examples, train, processes) == 0:
            raise PacaError(
                f"{answers:,} answers are made at a time (train.per_device_train_batch_size × "
                f"train.gradient_accumulation_steps, in {processes} processes, or train.generation_batch_size), "
                f"{train['num_generations']} to a prompt (train.num_generations): that takes "
                f"{answers // train['num_generations']:,} prompts, and there are {examples:,}. Lower one of the first, "
                "or give more prompts."
            )


def _prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[Tokens]:
    prompt = example["prompt"]
    chat = not isinstance(prompt, str)
    text = render(tokenizer, prompt, example[ORIGIN], add_generation_prompt=True) if chat else prompt
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return [Tokens(ids, [IGNORED] * len(ids))]


def _check_groups(train: Mapping[str, Any], processes: int) -> None:
    answers = answers_at_a_time(train, processes)
    if answers % train["num_generations"]:
        raise PacaError(
            f"{answers} answers are made at a time (train.per_device_train_batch_size × accumulated batches, in "
            f"{processes} processes). train.num_generations: {train['num_generations']} does not divide it. "
            "Change one of them."
        )


def answers_at_a_time(train: Mapping[str, Any], processes: int) -> int:
    """Answers that are made before any is learned from, as TRL counts them."""
    batches = train.get("steps_per_generation") or train["gradient_accumulation_steps"]
    return train.get("generation_batch_size") or train["per_device_train_batch_size"] * processes * batches

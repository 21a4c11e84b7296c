"""The columns of a run: chosen on its own data before training, kept in the run folder, and used again from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from paca import __version__
from paca.columns.selection import AT_RANDOM, BLOCK, FROM_BATCHES
from paca.config import PacaConfig
from paca.data import Examples
from paca.data.evenly import spread_evenly
from paca.data.tokens import IGNORED, what_stays
from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.pretrained.content import model_content
from paca.pretrained.whole_output import write_whole
from paca.training.config import adapter_settings
from paca.training.config.adapter_settings import FROM_DATA, goes_by_data, is_made
from paca.training.config.run_config import CalibrationSection, RunConfig
from paca.training.folder.run_folder import read_record
from paca.training.prompt_form import tokenizer_of
from paca.training.trainers import trainer_kind
from paca.tuner.calibration import select
from paca.tuner.calibration.selecting import with_indices

_NOT_ABOUT_COLUMNS = {"paca_alpha", "alpha_pattern", "init_weights", "original_weights"}


def describe_columns(config: RunConfig) -> str:
    """How the run chooses its columns, in words."""
    selection = config.adapter.get("selection", PacaConfig.selection)
    without_data = {
        "random": "random",
        "random_blocks": f"random_blocks: random, {BLOCK} neighbours at a time",
        "weight_norm": "weight_norm: those of largest norm in the weights",
    }
    return without_data.get(selection) or f"{selection}, {_from_data(config)}"


def describe_start(config: RunConfig) -> str | None:
    """How a LoRA that the run starts itself starts, in words; None for others."""
    start = config.adapter.get("init_lora_weights")
    if start in FROM_DATA:
        return f"{start}, {_from_data(config)} (the plan leaves this pass out)"
    return f"{start}, by random numbers" if is_made(config.adapter) else None


def told_of_pass(config: RunConfig) -> str | None:
    """That a run makes a pass over its data before it trains, and that no plan counts it; None for one that doesn't."""
    if not goes_by_data(config.method, config.adapter):
        return None
    chosen = "selection" if config.method == "paca" else "init_lora_weights"
    return (
        f"Before its first step the run makes a pass over data ({config.method}.{chosen}: {config.adapter[chosen]}), "
        f"{_from_data(config)}. Its memory and time are not in this plan."
    )


def _from_data(config: RunConfig) -> str:
    calibration = config.calibration
    length = f"cut to {calibration.max_length:,} tokens"
    return f"from at most {calibration.sequences:,} training examples {length}"


@dataclass(frozen=True)
class ColumnChoice:
    """Chooses the columns of one run, or finds them chosen.

    Args:
        config: The resolved run.
        examples: The training data, tokenized.
        arguments: Of the trainer that will train.
        file: Where the columns are kept.
        console: Where progress is shown.
    """

    config: RunConfig
    examples: Examples
    arguments: TrainingArguments
    file: Path
    console: Console

    def adapter(self, model: nn.Module) -> PacaConfig:
        """The adapter's config, with the columns in it that the run's settings choose for `model`.

        The first process chooses; the others are told.

        Raises:
            PacaError: The columns can't be chosen.
        """
        task = trainer_kind(self.config.train).task_type
        asked = adapter_settings.adapter_config("paca", self.config.adapter, task)
        assert isinstance(asked, PacaConfig)
        if asked.selection in AT_RANDOM:
            return asked
        found: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                found = [self._columns(model, asked)]
            except PacaError as error:  # which the others must hear of, or they would wait forever
                found = [str(error)]
        broadcast_object_list(found)
        if isinstance(found[0], str):
            raise PacaError(found[0])
        return with_indices(asked, found[0])

    def _columns(self, model: Any, asked: PacaConfig) -> dict[str, list[int]]:
        batches = self._batches() if asked.selection in FROM_BATCHES else []
        key = self._key(model, batches)
        kept = read_record(self.file)
        if kept.get("key") == key:
            say(self.console, f"Columns chosen by {asked.selection} before are used again: {self.file}")
            return kept["indices"]
        if batches:
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
            say(self.console, f"Choosing columns by {asked.selection}, from {tokens:,} tokens of the training data ...")
            place(model, self.arguments)
        try:
            selected = select(model, asked, batches, self.console)
        except ValueError as error:
            raise PacaError(f"The columns can't be chosen: {error}") from error
        assert selected.indices is not None
        content = {"key": key, "selection": asked.selection, "indices": selected.indices}
        write_whole(self.file, json.dumps(content))
        return selected.indices

    def _batches(self) -> list[dict[str, Tensor]]:
        gradients = self.config.adapter["selection"] == "gradient_norm"
        tokenizer = tokenizer_of(self.config)
        return calibration_batches(
            self.examples, tokenizer, self.arguments, self.config.calibration, with_labels=gradients
        )

    def _key(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> str:
        """What the columns follow from: the model, the tokens, the settings."""
        settings = {k: v for k, v in self.config.adapter.items() if k not in _NOT_ABOUT_COLUMNS}
        about = [__version__, settings, str(self.config.model.name), str(self.config.model.dtype)]
        digest = hashlib.sha256(json.dumps(about).encode())
        for batch in batches:
            for name in sorted(batch):
                digest.update(f"{name}{tuple(batch[name].shape)}".encode())
                digest.update(batch[name].numpy().tobytes())
        digest.update(model_content(model).encode())
        return digest.hexdigest()


def calibration_batches(
    examples: Examples, tokenizer: Any, arguments: TrainingArguments, section: CalibrationSection, *, with_labels: bool
) -> list[dict[str, Tensor]]:
    """Batches of training examples, cut and padded as `SFTTrainer` does it, spread evenly over the data.

    Args:
        examples: The training data, tokenized.
        tokenizer: Of the model.
        arguments: Of the trainer that will train.
        section: How many, how long, how many at a time.
        with_labels: Keep the end of each example, where the answer is, and its labels; else the start.

    Raises:
        PacaError: Nothing is left of the examples.
    """
    dataset = spread_evenly(examples.dataset, section.sequences)
    args: Any = arguments
    length = min(section.max_length, args.max_length or section.max_length)
    stays = what_stays(length, keep_end=with_labels)
    rows = [{name: row[name][stays] for name in ("input_ids", "labels")} for row in dataset]
    counting = "labels" if with_labels else "input_ids"
    rows = [row for row in rows if any(token != IGNORED for token in row[counting])]
    if not rows:
        raise PacaError(
            f"Nothing to choose by: of {len(dataset)} training examples cut to {length} tokens, none has a "
            "token that counts in the loss. Raise calibration.max_length or calibration.sequences."
        )
    rows.sort(key=lambda row: len(row["input_ids"]))  # little padding
    padding = tokenizer.convert_tokens_to_ids(args.pad_token or tokenizer.pad_token)
    if padding is None:
        raise PacaError(f"train.pad_token {args.pad_token!r} is no token of the model's. Give one of its tokenizer's.")
    collate = DataCollatorForLanguageModeling(padding, pad_to_multiple_of=args.pad_to_multiple_of)
    batches = []
    for start in range(0, len(rows), section.batch_size):
        batch = collate(rows[start : start + section.batch_size])
        wanted = ("input_ids", "attention_mask", "labels") if with_labels else ("input_ids", "attention_mask")
        batches.append({name: batch[name] for name in wanted})
    return batches


def place(model: Any, arguments: TrainingArguments) -> None:
    """Move the model where the trainer would, if it would."""
    sharded = arguments.fsdp or arguments.deepspeed_plugin
    if arguments.place_model_on_device is not False and not sharded and not hasattr(model, "hf_device_map"):
        model.to(arguments.device)

"""What a run does differently for each value of `train.trainer`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.compute as pc
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerState, TrainingArguments

from paca.data import Examples, load_examples, split_heldout
from paca.data.chat_template import unprompted_header, unused_fields
from paca.data.evenly import spread_evenly
from paca.data.overlap import shared, told_of_copies
from paca.data.packing import Packed
from paca.data.sample import Sample
from paca.data.tokens import as_template_wants
from paca.messages.errors import PacaError
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import DataSection, RunConfig
from paca.training.prompt_form import choose_form, tokenizer_of


@dataclass
class RunData:
    """The data of a run, in the shape that its trainer takes."""

    train: Examples
    eval: Examples | None
    loss: str
    """What the loss is about, for people."""
    template: str | None = None
    """The form in which a language model reads it, in words."""
    sample: Sample | None = None
    """Some of the training data as tokens, once `TrainerKind.shape` has looked at it."""
    packed: Packed | None = None
    """What packing makes of the training data, from then on; None where it is off."""
    left_out: tuple[int, int] = (0, 0)
    """How many training and held-out examples will be, as nothing can be learned from them."""
    labels: list[str] | None = None
    """Of a classifier."""
    system: str | None = None
    """The system message that all of the training data begins with."""
    context: int | None = None
    """`paca.pretrained.context_length` of the model, once that is known."""


class TrainerKind:
    """One value of `train.trainer`: its settings, its model, its data and how its trainer is made.

    A subclass fills in the first four, and overrides what differs from supervised training of a language model.
    """

    name: ClassVar[str]
    arguments: ClassVar[type[TrainingArguments]]
    """Its fields are keys of `train:`."""
    own_keys: ClassVar[dict[str, Any]] = {}
    """Further keys of `train:`, with their types."""
    forced: ClassVar[dict[str, Any]] = {}
    """Fields of `arguments` that a run decides itself."""
    trainer: ClassVar[type[Trainer]]
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    """The `AutoModel...` of transformers that makes the model."""
    task_type: ClassVar[str | None] = "CAUSAL_LM"
    """By PEFT's names."""
    renders: ClassVar[bool] = True
    """Whether a chat template can render its data."""
    learning_rate: ClassVar[float] = 3e-4
    """Our default for adapters."""
    counts: ClassVar[str] = "tokens"
    """What the speed is measured in."""
    measured: ClassVar[tuple[str, ...] | None] = None
    """What each evaluation measures; None where it depends on settings."""
    score: ClassVar[str | None] = None
    """The metric of an evaluation that says how good the model is, besides its loss."""
    scored_before: ClassVar[bool] = True
    """Whether that tells anything before the weights have moved."""
    lengths_known: ClassVar[bool] = True
    """Whether data tells how many tokens a model reads of an example."""
    probed: ClassVar[bool] = True
    """Whether its longest batch is known before it trains."""

    @property
    def library(self) -> str:
        """Whose defaults `arguments` has."""
        return "TRL" if self.arguments.__module__.startswith("trl.") else "transformers"

    def check(self, settings: Mapping[str, Any], origins: Origins) -> None:
        """Refuse values of `own_keys` that cannot work.

        Raises:
            PacaError: Names the key.
        """

    def check_planned(self, settings: Mapping[str, Any]) -> None:
        """Refuse what memory can't be foretold for.

        Raises:
            PacaError: Names the key.
        """

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults of its own, where the user gave nothing: tokens are counted without padding."""
        return {"include_num_input_tokens_seen": "non_padding"}

    def read(self, config: RunConfig) -> RunData:
        """Read the data, and see that each record has what the loss needs.

        Raises:
            PacaError: Names the data and the first record that is wrong.
        """
        raise NotImplementedError

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """Look at some of the data as tokens, and make it what the trainer takes.

        Args:
            config: With its defaults.
            data: From `read`.
            whole: Also tokenize all of it, where that is not the trainer's work.
        """
        return data

    def lines(self, config: RunConfig) -> list[tuple[str, str]]:
        """What the plan says besides, as labels and texts."""
        return []

    def make(self, config: RunConfig, adapter: Any, data: RunData, **parts: Any) -> Trainer:
        """The trainer.

        Args:
            config: The resolved run.
            adapter: A `PeftConfig` to put in; None where the model has one already, or gets none.
            data: Of the run.
            parts: Further arguments of the trainer: model, args, processing_class, callbacks.
        """
        trainer: Any = self.trainer(peft_config=adapter, **datasets_of(data), **parts)  # type: ignore[call-arg]
        model = trainer.model
        if "ref" in getattr(model, "peft_config", ()):  # TRL's copy of an adapter that is in the model already
            if config.model.adapter is None:  # and changes nothing yet: disabled it is the same
                model.delete_adapter("ref")
            else:  # the reference, which stays as it is and is not saved
                vars(model)["save_pretrained"] = partial(model.save_pretrained, selected_adapters=["default"])
        return trainer

    def check_prepared(self, config: RunConfig, trainer: Any, data: RunData) -> tuple[int, int]:
        """Look at what the trainer made of the data.

        Returns:
            How many training and held-out examples are left out, as nothing can be learned from them.

        Raises:
            PacaError: There are such examples, and `data.unusable` is not `leave_out`.
        """
        return 0, 0

    def right(self, trainer: Any, step: int) -> str:
        """1 or 0 for each held-out example, in order, by the weights of a step; empty where the trainer tells none."""
        return ""

    def evaluate_examples(self, trainer: Any, step: int) -> None:
        """Evaluate anew where what `right` tells is not of the weights of `step`, which `trainer` has."""

    def resuming(self, arguments: Any, state: TrainerState) -> str:
        """What is said when a run goes on from a checkpoint.

        Args:
            arguments: Of the trainer.
            state: Of the checkpoint.
        """
        return f"Resuming after step {state.global_step} of {state.max_steps}."

    def lengths(self, dataset: Dataset) -> list[int]:
        """How large each row of the trainer's dataset is, in tokens."""
        found: list[int] = []
        for batch in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
            found.extend(pc.list_value_length(batch["input_ids"]).to_pylist())
        return found

    def batches(self, examples: int, train: Mapping[str, Any], processes: int) -> int | None:
        """Batches of an epoch of so many examples, counted as the trainer counts them; None where data decides it."""
        batches = examples / (train["per_device_train_batch_size"] * processes)
        return math.floor(batches) if train.get("dataloader_drop_last") else math.ceil(batches)

    def steps(self, examples: int, train: Mapping[str, Any], processes: int) -> int | None:
        """Optimizer steps of all epochs; None where data decides it."""
        batches = self.batches(examples, train, processes)
        if batches is None:
            return None
        steps_per_epoch = max(1, math.ceil(batches / train["gradient_accumulation_steps"]))
        return math.ceil(train["num_train_epochs"] * steps_per_epoch)

    def check_batches(self, examples: int, train: Mapping[str, Any], processes: int) -> None:
        """Refuse data of which there is not one batch.

        Raises:
            PacaError: Names the settings that make it so.
        """
        if self.batches(examples, train, processes) == 0:
            raise PacaError(
                f"{examples:,} training examples don't fill a batch (train.per_device_train_batch_size: "
                f"{train['per_device_train_batch_size']}, in {processes} processes), and train.dataloader_drop_last "
                "leaves out one that is not full. Lower the first, or leave out the second."
            )


def datasets_of(data: RunData) -> dict[str, Any]:
    """The arguments of a trainer that are data."""
    return {"train_dataset": data.train.dataset, "eval_dataset": None if data.eval is None else data.eval.dataset}


def read_texts(config: RunConfig, family: str) -> tuple[Examples, Examples | None, str]:
    """Training data, held-out data and the form in which they are read, in words.

    Args:
        config: The run.
        family: As in `load_examples`.

    Raises:
        PacaError: They can't be read.
    """
    tokenizer = tokenizer_of(config)
    train, held_out = read_split(config, partial(reader, family=family))
    form = choose_form(config, train, tokenizer)
    if family in ("prompts", "preferences"):  # which TRL renders
        train = as_template_wants(train, tokenizer)
        held_out = held_out and as_template_wants(held_out, tokenizer)
    if unused := unused_fields(train, tokenizer) if train.is_conversational else []:
        note = f"; the template does not use these fields of messages: {', '.join(unused)}"
        train = _with_note(train, note)
    answers = train.is_conversational and config.train.get("trainer") != "reward"  # a reward model writes nothing
    if header := unprompted_header(tokenizer) if answers else "":
        note = f"; the template ignores add_generation_prompt, so the model has to write {header!r} before each answer"
        train = _with_note(train, note)
    return train, held_out, form


def reader(config: RunConfig, family: str, *, held_out: bool = False) -> Callable[..., Examples]:
    """`load_examples` with what the run says of the data, training or `held_out`; `family` as there."""
    data = config.data
    return partial(
        load_examples,
        format=data.format,
        family=family,
        leave_out=data.unusable == "leave_out",
        columns=data.columns,
        own_names_suffice=held_out,
    )


def read_split(config: RunConfig, loader: Callable[..., Callable[..., Examples]]) -> tuple[Examples, Examples | None]:
    """Training data and held-out data, from two sources or from one; `loader` gives what loads them, as `reader`."""
    data, load = config.data, loader(config)
    train = load(data.train, split=data.split, limit=data.limit)
    train = _of_whole_files(train, data.sources, "split", data.split)
    if data.eval is None:
        return _with_note(train, told_of_copies(train.dataset)), None
    if isinstance(data.eval, str):
        held_out = loader(config, held_out=True)(data.eval, split=data.eval_split)
        held_out = _of_whole_files(held_out, [data.eval], "eval_split", data.eval_split)
    else:
        train, held_out = split_heldout(train, data.eval, data.heldout_seed)
    measured = spread_evenly(held_out.dataset, config.eval.limit)
    train = _with_note(train, told_of_copies(train.dataset))
    if count := shared(train.dataset, measured):
        said = f"; {count:,} of the {len(measured):,} held-out examples are among them, so trained on"
        train = _with_note(train, said)
    return train, dataclasses.replace(held_out, dataset=measured, also_trained=count)


def _of_whole_files(examples: Examples, sources: list[str], key: str, split: str) -> Examples:
    """Say so where the config names a split of what has none."""
    if split == getattr(DataSection, key) or not all(Path(name).expanduser().is_file() for name in sources):
        return examples
    return _with_note(examples, f"; data.{key}: {split} tells nothing here, as a file has no splits")


def _with_note(examples: Examples, note: str) -> Examples:
    return dataclasses.replace(examples, description=examples.description + note)

"""What a run will be, found out without loading weights: for ``--dry-run``, and as the first half of a run."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model

from paca.data import Examples, load_examples, split_heldout
from paca.lean import make_lean, undo_lean
from paca.messages.errors import PacaError
from paca.planning.estimate import PlannedModel
from paca.pretrained import load_config
from paca.pretrained.location import locate
from paca.pretrained.quantizing import quantize_outline
from paca.training import adapter_settings, train_settings
from paca.training.calibration import describe_columns
from paca.training.loss_scope import scope_loss, tokenizer_of
from paca.training.run_config import RunConfig
from paca.training.run_setting import holds_all_logits
from paca.training.target_names import check_target_names


@dataclass
class Plan:
    """A run with every setting decided."""

    config: RunConfig
    """The resolved config, every default of ours spelled out."""
    source: str
    """Where the model comes from: ``hub``, ``folder`` or ``gguf``."""
    architecture: str
    """Class of the model."""
    dtype: str
    """Type of the weights in memory."""
    parameters: int
    """Of the model without its adapter."""
    trainable_parameters: int
    targets: list[str]
    """Kinds of module that are adapted, such as ``q_proj``."""
    adapted_layers: int
    """How many modules are adapted."""
    train_examples: int
    eval_examples: int | None
    """None without held-out data."""
    data_format: str
    data_description: str
    """What was recognised in the data, in words."""
    loss_scope: str
    """Which tokens count in the loss, in words."""
    processes: int
    sequences_per_step: int
    """Over all processes and accumulated batches; of packed sequences where packing is on."""
    tokens_per_step: int | None
    """At most: every sequence at its longest. None where train.max_length is null."""
    steps: int | None
    """None where packing decides it."""

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the description."""
        share = 100 * self.trainable_parameters / self.parameters
        tokens = "no limit" if self.tokens_per_step is None else f"at most {self.tokens_per_step:,}"
        dtype = ", ".join(filter(None, (self.dtype, self.config.model.quantization)))
        lines = [
            ("model", f"{self.config.model.name} ({self.architecture}, {self.parameters:,} parameters, {dtype})"),
            ("blocks", self._blocks()),
            ("targets", f"{', '.join(self.targets)}: {self.adapted_layers} layers"),
            ("columns", describe_columns(self.config)),
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.3f} %)"),
            ("data", self.data_description),
            ("training examples", f"{self.train_examples:,}"),
            ("loss on", self.loss_scope),
            ("logits", self._logits()),
            ("held-out examples", "none" if self.eval_examples is None else f"{self.eval_examples:,}"),
            ("tokens per step", f"{tokens} ({self.sequences_per_step} sequences)"),
            ("steps", "known once the data is packed" if self.steps is None else f"{self.steps:,}"),
            ("run folder", self.config.output.dir),
        ]
        if self.processes > 1:
            lines.insert(-1, ("processes", str(self.processes)))
        return lines

    def _blocks(self) -> str:
        if not self.config.model.lean:
            return "as in transformers"
        return "lean" if self.config.model.recompute is None else "lean; the MLP is computed again in the backward pass"

    def _logits(self) -> str:
        if holds_all_logits(self.config.train):
            return "of a whole batch at once, because of train.label_smoothing_factor"
        return "tile by tile (TRL's fused output head), never of a whole batch at once"


@dataclass
class PreparedRun:
    """A plan and the data that was read for it."""

    plan: Plan
    train: Examples
    eval: Examples | None
    outline: PlannedModel
    """The adapted model without weights, for what is foretold of its memory."""
    loss_settings: dict[str, bool]
    """Fields of SFTConfig. They follow from the data, so the resolved config leaves them to be found again."""


def describe(config: RunConfig) -> Plan:
    """What ``config`` will do; reads the data and the model's shapes, not its weights.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    return prepare(config).plan


def prepare(config: RunConfig) -> PreparedRun:
    """As :func:`describe`, keeping the data.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    config = copy.deepcopy(config)
    named = config.model
    outline = load_config(named.name, named.dtype, named.revision, named.trust_remote_code)
    tokenizer = tokenizer_of(named, config.train)
    train, held_out = _read_data(config, conversational=tokenizer.chat_template is not None)
    scope = scope_loss(train, held_out, tokenizer, config.train)
    model = outline.model
    if named.lean:  # a block that it does not know is refused here, before weights are loaded
        undo_lean(make_lean(model, named.recompute))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    config.train = train_settings.with_defaults(config.train, model, has_eval=held_out is not None)
    check_target_names(config.paca, model, named.name)
    if named.quantization is not None:
        model = quantize_outline(model, named.quantization)
    try:
        adapted = get_peft_model(model, adapter_settings.outline_config(config.paca))
    except (ValueError, TypeError) as error:
        raise PacaError(f"The section paca does not fit {config.model.name}: {error}") from error
    if named.quantization is not None:
        if config.paca.get("rotate_every") is not None:
            raise PacaError(
                "paca.rotate_every folds columns into the weights, which quantized ones can't take. Leave it out, or "
                "leave out model.quantization."
            )
        config.paca.setdefault("original_weights", named.name)
    config.paca = adapter_settings.with_defaults(config.paca)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sequences = _sequences_per_step(config.train, processes)
    longest = config.train["max_length"]
    plan = Plan(
        config=config,
        source=locate(named.name).source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        targets=_kinds(adapted.targeted_module_names),
        adapted_layers=len(adapted.targeted_module_names),
        train_examples=len(train.dataset),
        eval_examples=None if held_out is None else len(held_out.dataset),
        data_format=train.format,
        data_description=scope.train.description,
        loss_scope=scope.description,
        processes=processes,
        sequences_per_step=sequences,
        tokens_per_step=None if longest is None else sequences * longest,
        steps=planned_steps(len(train.dataset), config.train, processes),
    )
    return PreparedRun(plan, scope.train, scope.eval, adapted, scope.settings)


def planned_steps(examples: int, train: dict[str, Any], processes: int) -> int | None:
    """Optimizer steps over ``examples`` examples, counted as transformers' Trainer counts them.

    None where that depends on how many sequences packing makes of them.
    """
    if train.get("max_steps", -1) > 0:
        return train["max_steps"]
    if train["packing"]:
        return None
    batches = examples / (train["per_device_train_batch_size"] * processes)
    batches = math.floor(batches) if train.get("dataloader_drop_last") else math.ceil(batches)
    steps_per_epoch = max(1, math.ceil(batches / train["gradient_accumulation_steps"]))
    return math.ceil(train["num_train_epochs"] * steps_per_epoch)


def _read_data(config: RunConfig, *, conversational: bool) -> tuple[Examples, Examples | None]:
    data = config.data
    train = load_examples(
        data.train, format=data.format, split=data.split, limit=data.limit, conversational=conversational
    )
    if data.eval is None:
        return train, None
    if isinstance(data.eval, str):
        held_out = load_examples(
            data.eval, format=data.format, split=data.eval_split, limit=config.eval.limit, conversational=conversational
        )
        return train, held_out
    train, held_out = split_heldout(train, data.eval, data.heldout_seed)
    count = min(len(held_out.dataset), config.eval.limit or len(held_out.dataset))
    return train, dataclasses.replace(held_out, dataset=held_out.dataset.select(range(count)))


def _sequences_per_step(train: dict[str, Any], processes: int) -> int:
    return train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * processes


def _kinds(names: list[str]) -> list[str]:
    """``model.layers.3.self_attn.q_proj`` of every layer → ``q_proj``, in the order of the model."""
    return list(dict.fromkeys(re.sub(r"^.*\.", "", name) for name in names))

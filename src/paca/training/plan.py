"""What a run will be, found out without loading weights: for `--dry-run`, and as the first half of a run."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import get_peft_model
from rich.console import Console
from transformers import PreTrainedModel

from paca.data.sample import Sample
from paca.lean import make_lean, undo_lean
from paca.messages.errors import PacaError
from paca.messages.processes import launched_processes
from paca.messages.say import say
from paca.planning.estimate import PlannedModel
from paca.pretrained.quantizing import quantize_outline
from paca.training.calibration import describe_columns
from paca.training.config import adapter_settings, train_settings
from paca.training.config.learning_rate import AUTO, automatic_rate, beside_automatic, follows_weights
from paca.training.config.run_config import RunConfig
from paca.training.config.target_names import check_target_names, told_of_layers
from paca.training.folder.disk_need import DiskNeed, disk_need, tell_of_disk
from paca.training.folder.same_run import inputs_of
from paca.training.named_model import outline_of, size_of_weights, source_of, train_heads
from paca.training.reporting.data_preview import tell_of_cuts
from paca.training.trainers import trainer_kind
from paca.training.trainers.kind import RunData
from paca.training.trainers.sections import check_sections_fit


@dataclass
class Plan:
    """A run with every setting decided."""

    config: RunConfig
    """The resolved config, every default of ours spelled out."""
    source: str
    """Where the model comes from: `hub`, `folder` or `gguf`."""
    architecture: str
    """Class of the model."""
    dtype: str
    """Type of the weights in memory."""
    parameters: int
    """Of the model without its adapter."""
    trainable_parameters: int
    method: str
    """`paca`, `lora`, `full`, or the name of another method of PEFT, such as `ia3`."""
    targets: list[str]
    """Kinds of module that are adapted, such as `q_proj`; none where a method has no such modules."""
    adapted_layers: int
    """How many modules are adapted."""
    rate_rule: str
    """Where the rate is from, in words; what `auto` would be, where the user gave another."""
    own_defaults: dict[str, Any]
    """Settings of `train` that the user did not give and that are others than TRL's own."""
    train_examples: int
    eval_examples: int | None
    """None without held-out data."""
    data_format: str
    data_description: str
    """What was recognised in the data, in words."""
    template: str | None
    """The form of the prompts, in words; None where no text is generated."""
    loss_scope: str
    """Which tokens count in the loss, in words."""
    sample: Sample | None
    """Some of the training data as tokens, where a language model learns whole texts."""
    processes: int
    sequences_per_step: int
    """Over all processes and accumulated batches, no more than there are; of packed ones where packing is on."""
    tokens_per_step: int | None
    """About: by the mean of the sample, or full sequences where packing is on; None where examples
    have no tokens, or some are yet to be made."""
    steps: int | None
    """None where packing decides it."""
    disk: DiskNeed
    """What it writes."""
    left_out: str | None = None
    """What is said of examples that are left out, as `train.max_length` leaves nothing of them to learn."""

    def without(self, train: int, held_out: int) -> Plan:
        """The same run without so many training and held-out examples."""
        if not train and not held_out:
            return self
        said = f"{train:,} training and {held_out:,} held-out examples are too long for train.max_length, and left out."
        return replace(self, train_examples=self.train_examples - train, left_out=said)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the description."""
        share = 100 * self.trainable_parameters / self.parameters
        lost = f" ({self._unusable():,} left out)" if self._unusable() else ""
        kind, whole = trainer_kind(self.config.train), self.config.adapter.get("modules_to_save")
        per_step, rank = f"{self.sequences_per_step:,}", self.config.train.get("factor_rank")
        unit = "pair" if self.sample is not None and self.sample.rejected else "sequence"
        sequences = f"{per_step} {unit}{'' if self.sequences_per_step == 1 else 's'}"
        if kind.counts == "tokens" and self.tokens_per_step is not None:
            per_step = f"about {self.tokens_per_step:,} ({sequences})"
        elif kind.counts == "tokens":
            per_step = f"those of {sequences}"
        scope = self.loss_scope
        if self.sample is not None and self.sample.share is not None:
            scope += f": {self.sample.share:.0%} of the tokens"
        dtype = ", ".join(filter(None, (self.dtype, self.config.model.quantization)))
        lines = [
            ("model", f"{self.config.model.name} ({self.architecture}, {self.parameters:,} parameters, {dtype})"),
            ("blocks", self._blocks()),
            ("method", f"{self.method}{self._adapted()}"),
            *([("columns", describe_columns(self.config))] if self.method == "paca" else []),
            *([] if rank is None else [("factors", f"of rank {rank}: AdamW steps these, and deltas follow")]),
            *([("trained whole", ", ".join(whole))] if whole else []),
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.3f} %)"),
            ("data", self.data_description),
            ("training examples", f"{self.train_examples - self._unusable():,}{lost}"),
            *([] if self.template is None else [("template", self.template)]),
            ("loss on", scope),
            *kind.lines(self.config),
            ("held-out examples", "none" if self.eval_examples is None else f"{self.eval_examples:,}"),
            (f"{kind.counts} per step", per_step),
            ("steps", self._steps()),
            ("learning rate", f"{self.config.train['learning_rate']:g} ({self.rate_rule})"),
            ("run folder", self.config.output.dir),
            ("disk space", str(self.disk)),
        ]
        others = [f"{name} {json.dumps(value)}" for name, value in self.own_defaults.items() if name != "learning_rate"]
        if others:
            lines.insert(-2, ("defaults of paca", f"{', '.join(others)} (TRL has others)"))
        if self.processes > 1:
            lines.insert(-2, ("processes", str(self.processes)))
        return lines

    def _adapted(self) -> str:
        return f", on {', '.join(self.targets)}: {self.adapted_layers} layers" if self.targets else ""

    def _blocks(self) -> str:
        if not self.config.model.lean:
            return "as in transformers"
        return "lean" if self.config.model.recompute is None else "lean; the MLP is computed again in the backward pass"

    def _unusable(self) -> int:
        return 0 if self.sample is None else self.sample.unusable

    def _steps(self) -> str:
        examples = self.train_examples - self._unusable()
        if self.steps is not None:
            return f"{planned_steps(examples, self.config.train, self.processes):,}"
        assert self.sample is not None
        sequences = math.ceil(examples * self.sample.mean / self.config.train["max_length"])
        steps = planned_steps(sequences, {**self.config.train, "packing": False}, self.processes)
        return f"about {steps:,}, known once the data is packed"


def show_plan(plan: Plan, console: Console, *, run: bool = False) -> None:
    """Print what is going to be trained; PacaError if its result does not fit on the disk, or for `tell_of_cuts`."""
    width = max(len(label) for label, _ in plan.lines())
    for label, text in plan.lines():
        say(console, f"{label:<{width}}  {text}")
    tell_of_cuts(plan.sample, console, run=run)
    tell_of_disk(plan.disk, Path(plan.config.output.dir), console)


@dataclass
class PreparedRun:
    """A plan and the data that was read for it."""

    plan: Plan
    data: RunData
    """With fields of the trainer's settings that follow from it; the resolved config leaves them to be found again."""
    inputs: dict[str, str]
    """From `inputs_of`, in the first process."""
    outline: PlannedModel
    """The adapted model without weights, for what is foretold of its memory."""


def describe(config: RunConfig) -> Plan:
    """What `config` will do; reads the data and the model's shapes, not its weights.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    return prepare(config, whole=False).plan


def prepare(config: RunConfig, *, whole: bool = True) -> PreparedRun:
    """As `describe`, keeping the data.

    Args:
        config: Of the run.
        whole: Tokenize the data, all of it.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    config = copy.deepcopy(config)
    named, given, method, rank = config.model, config.train, config.method, config.train.get("factor_rank")
    kind = trainer_kind(given)
    check_sections_fit(config, kind)
    if method == "full" and named.dtype == "auto":
        named.dtype = "float32"  # as TRL loads models: in 16 bits, small steps would be lost
    source = source_of(named)  # before its tokenizer is looked for
    data = kind.read(config)
    train, held_out = data.train, data.eval
    model = outline_of(named, kind.auto_class, data.labels).model
    if named.lean:  # a block that it does not know is refused here, before weights are loaded
        undo_lean(make_lean(model, named.recompute))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    automatic = given.get("learning_rate", AUTO) == AUTO
    size = size_of_weights(named, fetch=whole and automatic) if follows_weights(kind, method, rank) else None
    config.train = train_settings.with_defaults(
        given, model, has_eval=held_out is not None, method=method, adapter=config.adapter, weight_size=size
    )
    rate, rule = automatic_rate(kind, method, config.adapter, size, rank)
    check_target_names(method, config.adapter, model, named.name)
    if named.quantization is not None:
        model = quantize_outline(model, named.quantization)
    if data.labels is not None:
        train_heads(config, model)
    adapted = _adapted_outline(config, model, kind.task_type)
    if named.quantization is not None and method == "paca":
        if config.adapter.get("rotate_every") is not None:
            raise PacaError(
                "paca.rotate_every folds columns into the weights, which quantized ones can't take. Leave it out, or "
                "leave out model.quantization."
            )
        config.adapter.setdefault("original_weights", named.name)
    config.adapter = adapter_settings.with_defaults(method, config.adapter)
    processes = launched_processes()
    steps = planned_steps(len(train.dataset), config.train, processes)
    if "warmup_steps" not in given and steps is not None:
        config.train["warmup_steps"] = train_settings.warm_up(steps)
    elif steps == 1 and config.train["warmup_steps"]:
        raise PacaError(
            "The only step of this run would be the first of its warm-up, whose rate is 0: it would train nothing. "
            "Leave out train.warmup_steps, or train for more steps."
        )
    layers = getattr(adapted.base_model, "targeted_module_names", []) if method != "full" else []
    sequences = config.train["per_device_train_batch_size"] * config.train["gradient_accumulation_steps"] * processes
    inputs = inputs_of(config, train, held_out) if whole and os.environ.get("RANK", "0") == "0" else {}
    data = kind.shape(config, data, whole=whole)
    typical = None if data.sample is None or not kind.lengths_known else data.sample.mean
    if config.train.get("packing"):
        typical = config.train["max_length"]
    elif typical is not None:
        sequences = min(sequences, len(train.dataset))
    plan = Plan(
        config=config,
        source=source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        method=adapter_settings.method_name(method, config.adapter),
        targets=list(dict.fromkeys(re.sub(r"^.*\.", "", name) for name in layers)),  # in the order of the model
        adapted_layers=len(layers),
        rate_rule=f"auto: {rule}"
        if automatic
        else beside_automatic(config.train["learning_rate"], rate, by_rule=size is not None),
        own_defaults=train_settings.own_defaults(given, config.train),
        train_examples=len(train.dataset),
        eval_examples=None if held_out is None else len(held_out.dataset),
        data_format=train.format,
        data_description=train.description,
        template=data.template,
        loss_scope=data.loss,
        sample=data.sample,
        processes=processes,
        sequences_per_step=sequences,
        tokens_per_step=None if typical is None else round(sequences * typical),
        steps=steps,
        disk=disk_need(config, adapted, steps, base=parameters * dtype.itemsize if source == "gguf" else 0),
    )
    return PreparedRun(plan, data, inputs, adapted)


def _adapted_outline(config: RunConfig, model: PreTrainedModel, task_type: str | None) -> PlannedModel:
    adapter = adapter_settings.outline_config(config.method, config.adapter, task_type)
    if adapter is None:
        return model
    try:
        return get_peft_model(model, adapter, autocast_adapter_dtype=config.train["autocast_adapter_dtype"])
    except (ValueError, TypeError) as error:
        if "No modules were targeted" in str(error):
            reason = f"nothing is adapted in it. Name layers with target_modules. {told_of_layers(model)}"
        else:
            reason = str(error)
        raise PacaError(f"The section {config.method} does not fit {config.model.name}: {reason}") from error


def planned_steps(examples: int, train: dict[str, Any], processes: int) -> int | None:
    """Optimizer steps over `examples` examples, counted as transformers' Trainer counts them.

    None where that depends on how many sequences packing makes of them.
    """
    if train.get("max_steps", -1) > 0:
        return train["max_steps"]
    return trainer_kind(train).steps(examples, train, processes)

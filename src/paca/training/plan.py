"""What a run will be, found out without loading weights: for ``--dry-run``, and as the first half of a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model
from transformers import PreTrainedModel

from paca.data import Examples, load_examples, split_heldout, tokenize
from paca.data.sample import Sample, take_sample
from paca.lean import make_lean, undo_lean
from paca.messages.errors import PacaError
from paca.planning.estimate import PlannedModel
from paca.pretrained import load_config
from paca.pretrained.location import locate
from paca.pretrained.quantizing import quantize_outline
from paca.training import adapter_settings, train_settings
from paca.training.calibration import describe_columns
from paca.training.prompt_form import choose_form, describe_loss, tokenizer_of, trains_everything
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
    method: str
    """``paca``, ``lora``, ``full``, or the name of another method of PEFT, such as ``ia3``."""
    targets: list[str]
    """Kinds of module that are adapted, such as ``q_proj``; none where a method has no such modules."""
    adapted_layers: int
    """How many modules are adapted."""
    own_defaults: dict[str, Any]
    """Settings of ``train`` that the user did not give and that are others than TRL's own."""
    train_examples: int
    eval_examples: int | None
    """None without held-out data."""
    data_format: str
    data_description: str
    """What was recognised in the data, in words."""
    template: str
    """The form of the prompts, in words."""
    loss_scope: str
    """Which tokens count in the loss, in words."""
    sample: Sample
    """Some of the training data as tokens."""
    processes: int
    sequences_per_step: int
    """Over all processes and accumulated batches; of packed sequences where packing is on."""
    tokens_per_step: int
    """About: by the mean of the sample, or full sequences where packing is on."""
    steps: int | None
    """None where packing decides it."""

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the description."""
        share = 100 * self.trainable_parameters / self.parameters
        dtype = ", ".join(filter(None, (self.dtype, self.config.model.quantization)))
        lines = [
            ("model", f"{self.config.model.name} ({self.architecture}, {self.parameters:,} parameters, {dtype})"),
            ("blocks", self._blocks()),
            ("method", f"{self.method}{self._adapted()}"),
            *([("columns", describe_columns(self.config))] if self.method == "paca" else []),
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.3f} %)"),
            ("data", self.data_description),
            ("training examples", f"{self.train_examples:,}"),
            ("template", self.template),
            ("loss on", f"{self.loss_scope}: {100 * self.sample.share:.0f} % of the tokens"),
            ("logits", self._logits()),
            ("held-out examples", "none" if self.eval_examples is None else f"{self.eval_examples:,}"),
            ("tokens per step", f"about {self.tokens_per_step:,} ({self.sequences_per_step} sequences)"),
            ("steps", self._steps()),
            ("run folder", self.config.output.dir),
        ]
        if self.own_defaults:
            settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in self.own_defaults.items())
            lines.insert(-1, ("defaults of paca", f"{settings} (TRL has others)"))
        if self.processes > 1:
            lines.insert(-1, ("processes", str(self.processes)))
        return lines

    def _adapted(self) -> str:
        return f", on {', '.join(self.targets)}: {self.adapted_layers} layers" if self.targets else ""

    def _blocks(self) -> str:
        if not self.config.model.lean:
            return "as in transformers"
        return "lean" if self.config.model.recompute is None else "lean; the MLP is computed again in the backward pass"

    def _steps(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,}"
        sequences = math.ceil(self.train_examples * self.sample.mean / self.config.train["max_length"])
        steps = planned_steps(sequences, {**self.config.train, "packing": False}, self.processes)
        return f"about {steps:,}, known once the data is packed"

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


def describe(config: RunConfig) -> Plan:
    """What ``config`` will do; reads the data and the model's shapes, not its weights.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    return prepare(config, whole=False).plan


def prepare(config: RunConfig, *, whole: bool = True) -> PreparedRun:
    """As :func:`describe`, keeping the data.

    Args:
        config: Of the run.
        whole: Tokenize the data, all of it.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    config = copy.deepcopy(config)
    named, given, method = config.model, config.train, config.method
    if method == "full" and named.dtype == "auto":
        named.dtype = "float32"  # as TRL loads models: in 16 bits, small steps would be lost
    outline = load_config(named.name, named.dtype, named.revision, named.trust_remote_code)
    tokenizer = tokenizer_of(config)
    train, held_out = _read_data(config)
    template = choose_form(config, train, tokenizer)
    everything = trains_everything(config, train)
    model = outline.model
    if named.lean:  # a block that it does not know is refused here, before weights are loaded
        undo_lean(make_lean(model, named.recompute))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    config.train = train_settings.with_defaults(given, model, has_eval=held_out is not None, method=method)
    check_target_names(method, config.adapter, model, named.name)
    if named.quantization is not None:
        model = quantize_outline(model, named.quantization)
    adapted = _adapted_outline(config, model)
    if named.quantization is not None and method == "paca":
        if config.adapter.get("rotate_every") is not None:
            raise PacaError(
                "paca.rotate_every folds columns into the weights, which quantized ones can't take. Leave it out, or "
                "leave out model.quantization."
            )
        config.adapter.setdefault("original_weights", named.name)
    config.adapter = adapter_settings.with_defaults(method, config.adapter)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = planned_steps(len(train.dataset), config.train, processes)
    if "warmup_steps" not in given and steps is not None:
        config.train["warmup_steps"] = train_settings.warm_up(steps)
    elif steps == 1 and config.train["warmup_steps"]:
        raise PacaError(
            "The only step of this run would be the first of its warm-up, whose rate is 0: it would train nothing. "
            "Leave out train.warmup_steps, or train for more steps."
        )
    layers = getattr(adapted.base_model, "targeted_module_names", []) if method != "full" else []
    sequences = _sequences_per_step(config.train, processes)
    sample = take_sample(
        train,
        tokenizer,
        everything=everything,
        limit=config.train["max_length"],
        keep_end=config.train.get("truncation_mode") == "keep_end",
        batch_size=config.train["per_device_train_batch_size"],
    )
    typical = config.train["max_length"] if config.train["packing"] else sample.mean
    if whole:
        options: Any = {"everything": everything, "processes": config.train.get("dataset_num_proc")}
        train = tokenize(train, tokenizer, **options)
        held_out = None if held_out is None else tokenize(held_out, tokenizer, **options)
    plan = Plan(
        config=config,
        source=locate(named.name).source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        method=adapter_settings.method_name(method, config.adapter),
        targets=_kinds(layers),
        adapted_layers=len(layers),
        own_defaults=train_settings.own_defaults(given, config.train),
        train_examples=len(train.dataset),
        eval_examples=None if held_out is None else len(held_out.dataset),
        data_format=train.format,
        data_description=train.description,
        template=template,
        loss_scope=describe_loss(config, train),
        sample=sample,
        processes=processes,
        sequences_per_step=sequences,
        tokens_per_step=round(sequences * typical),
        steps=steps,
    )
    return PreparedRun(plan, train, held_out, adapted)


def _adapted_outline(config: RunConfig, model: PreTrainedModel) -> PlannedModel:
    adapter = adapter_settings.outline_config(config.method, config.adapter)
    if adapter is None:
        return model
    try:
        return get_peft_model(model, adapter, autocast_adapter_dtype=config.train["autocast_adapter_dtype"])
    except (ValueError, TypeError) as error:
        raise PacaError(f"The section {config.method} does not fit {config.model.name}: {error}") from error


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


def _read_data(config: RunConfig) -> tuple[Examples, Examples | None]:
    data = config.data
    train = load_examples(data.train, format=data.format, split=data.split, limit=data.limit)
    if data.eval is None:
        return train, None
    if isinstance(data.eval, str):
        return train, load_examples(data.eval, format=data.format, split=data.eval_split, limit=config.eval.limit)
    train, held_out = split_heldout(train, data.eval, data.heldout_seed)
    count = min(len(held_out.dataset), config.eval.limit or len(held_out.dataset))
    return train, dataclasses.replace(held_out, dataset=held_out.dataset.select(range(count)))


def _sequences_per_step(train: dict[str, Any], processes: int) -> int:
    return train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * processes


def _kinds(names: list[str]) -> list[str]:
    """``model.layers.3.self_attn.q_proj`` of every layer → ``q_proj``, in the order of the model."""
    return list(dict.fromkeys(re.sub(r"^.*\.", "", name) for name in names))

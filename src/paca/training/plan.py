"""What a run will be, every setting decided, and its description."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from paca.messages.say import say
from paca.pretrained.location import lacks_weights
from paca.training.calibration import describe_columns, describe_start
from paca.training.config.run_config import RunConfig
from paca.training.early_stop import patience_warning
from paca.training.folder.disk_need import DiskNeed, tell_of_disk
from paca.training.positions import context_warning
from paca.training.products import tell_of_products
from paca.training.reporting.data_preview import cut_warning, told_of_unanswered
from paca.training.trainers import trainer_kind
from paca.training.trainers.kind import RunData


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
    experts: str | None
    """What is said of experts that are not trained."""
    rate_rule: str
    """Where the rate is from, in words; what `auto` would be, where the user gave another."""
    rate_far_off: str | None
    """How far it is from the automatic one, where that is far."""
    own_defaults: dict[str, Any]
    """Settings of `train` that the user did not give and that are others than TRL's own."""
    train_examples: int
    eval_examples: int | None
    """None without held-out data."""
    data: RunData
    """What was read for it; of a dry run texts, not tokens."""
    processes: int
    sequences_per_step: int
    """Over all processes and accumulated batches, no more than there are; of packed ones where packing is on."""
    tokens_per_step: int | None
    """About: by the mean of the sample, or of the sequences that packing makes; None where examples have no tokens, or
    some are yet to be made."""
    steps: int | None
    """None where packing decides it, and only a sample of the data was looked at."""
    disk: DiskNeed
    """What it writes."""
    left_out: str | None = None
    """What is said of examples that are left out, as `train.max_length` leaves nothing of them to learn."""

    def without(self, train: int, held_out: int) -> Plan:
        """The same run without so many training and held-out examples."""
        if not train and not held_out:
            return self
        said = f"{train:,} training and {held_out:,} held-out examples are too long for train.max_length, and left out."
        held = None if self.eval_examples is None else self.eval_examples - held_out
        return replace(self, train_examples=self.train_examples - train, eval_examples=held, left_out=said)

    def as_made(self, model: nn.Module) -> Plan:
        """The same run with the number of parameters that `model` trains, where data or weights share them out."""
        adapter = self.config.adapter
        if adapter.get("init_lora_weights") != "eva" and adapter.get("peft_type") != "ADAMSS":
            return self
        return replace(self, trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))

    def told_of_trained(self) -> str | None:
        """What is said of held-out examples that are trained on as well; None without any."""
        if self.data.eval is None or not (count := self.data.eval.also_trained):
            return None
        do = "Remove the duplicates from data.train."
        if isinstance(self.config.data.eval, str):
            do = "Take them out of one of the two, or hold out a share of data.train instead (data.eval: 0.05)."
        return (
            f"{count:,} of the {self.eval_examples:,} held-out examples {'are' if count > 1 else 'is'} trained on as "
            f"well: their scores tell what was learnt by heart. {do}"
        )

    def refusal(self) -> str | None:
        """What a run says when it refuses this data; None where nothing that was seen of it is refused."""
        sample = self.data.sample
        if self.config.train["trainer"] != "sft" or sample is None or not sample.refused:
            return None
        return told_of_unanswered(sample, self.data.context)

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the description."""
        share = 100 * self.trainable_parameters / self.parameters
        lost = f" ({self._unusable():,} left out)" if self._unusable() else ""
        kind, whole = trainer_kind(self.config.train), self.config.adapter.get("modules_to_save")
        per_step, rank = f"{self.sequences_per_step:,}", self.config.train.get("factor_rank")
        unit = "pair" if self.data.sample is not None and self.data.sample.rejected else "sequence"
        sequences = f"{per_step} {unit}{'' if self.sequences_per_step == 1 else 's'}"
        if kind.counts == "tokens" and self.tokens_per_step is not None:
            per_step = f"about {self.tokens_per_step:,} ({sequences})"
        elif kind.counts == "tokens":
            per_step = f"those of {sequences}"
        scope = self.data.loss
        if self.data.sample is not None and self.data.sample.share is not None:
            scope += f": {100 * self.data.sample.share:.0f} % of the tokens"
        dtype = ", ".join(filter(None, (self.dtype, self.config.model.quantization)))
        lines = [
            ("model", f"{self.config.model.name} ({self.architecture}, {self.parameters:,} parameters, {dtype})"),
            ("blocks", self._blocks()),
            ("method", f"{self.method}{self._adapted()}"),
            *self._begins(),
            *([] if (start := describe_start(self.config)) is None else [("start", start)]),
            *([] if self.experts is None else [("experts", self.experts)]),
            *([] if rank is None else [("factors", f"of rank {rank}: AdamW steps these, and deltas follow")]),
            *([("trained whole", ", ".join(whole))] if whole else []),
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.3f} %)"),
            ("data", self.data.train.description),
            ("training examples", f"{self.train_examples - self._unusable():,}{lost}"),
            *([] if self.data.template is None else [("template", self.data.template)]),
            ("loss on", scope),
            *kind.lines(self.config),
            ("held-out examples", self._held_out()),
            *self._scored(),
            (f"{kind.counts} per step", per_step),
            ("steps", self._steps()),
            ("learning rate", f"{self.config.train['learning_rate']:g} ({self.rate_rule}{self._rate_asked()})"),
            ("run folder", self.config.output.dir),
            ("disk space", str(self.disk)),
        ]
        others = [f"{name} {json.dumps(value)}" for name, value in self.own_defaults.items() if name != "learning_rate"]
        if others:
            lines.insert(-2, ("defaults of paca", f"{', '.join(others)} ({kind.library} has others)"))
        if self.processes > 1:
            lines.insert(-2, ("processes", str(self.processes)))
        return lines

    def _held_out(self) -> str:
        if self.eval_examples is None:
            return "none"
        return f"{self.eval_examples:,}{' (eval.limit)' if self.eval_examples == self.config.eval.limit else ''}"

    def _begins(self) -> list[tuple[str, str]]:
        """What the adapter is at first."""
        if (adapter := self.config.model.adapter) is not None:
            columns = ", its columns" if self.method == "paca" else ""
            return [("trained on from", f"{adapter}: its layers{columns} and what it has learned")]
        return [("columns", describe_columns(self.config))] if self.method == "paca" else []

    def _scored(self) -> list[tuple[str, str]]:
        """What the held-out data is scored by as a task, which may take longer than the training."""
        asked = self.config.eval
        if asked.metric is None:
            return []
        when = " and ".join(name for name in ("before", "after") if getattr(asked, name))
        longest = f", answers of up to {asked.max_new_tokens:,} tokens" if asked.metric == "exact_match" else ""
        by, when = f"{asked.metric}{asked.compared}", when or "neither before nor after"
        return [("scored by", f"{by}, {when} training{longest}")]

    def _adapted(self) -> str:
        return f", on {', '.join(self.targets)}: {self.adapted_layers} layers" if self.targets else ""

    def _blocks(self) -> str:
        if not self.config.model.lean:
            return "as in transformers"
        return "lean" if self.config.model.recompute is None else "lean; the MLP is computed again in the backward pass"

    def _unusable(self) -> int:
        return 0 if self.data.sample is None else self.data.sample.unusable

    def rate_warning(self) -> str | None:
        """What its line says, where a rate is far off: a line of many is overlooked."""
        if self.config.train["learning_rate"] == 0:
            return "train.learning_rate is 0: this run learns nothing. Leave it out for the automatic rate."
        far = self.rate_far_off
        return f"train.learning_rate is {far} as the automatic one ({self.rate_rule})." if far else None

    def _rate_asked(self) -> str:
        return f": is it right? It is {self.rate_far_off}" if self.rate_far_off else ""

    def _steps(self) -> str:
        patience = self.config.train.get("early_stopping_patience")
        return self._all_steps() + ("" if patience is None else f" at most (early_stopping_patience {patience})")

    def _all_steps(self) -> str:
        if (packed := self.data.packed) is None:
            return f"{planned_steps(self.train_examples - self._unusable(), self.config.train, self.processes):,}"
        steps = planned_steps(packed.sequences, {**self.config.train, "packing": False}, self.processes)
        return f"{steps:,}" if self.steps is not None else f"about {steps:,}, known once all of the data is packed"


def show_plan(plan: Plan, console: Console, record: dict[str, str] | None = None) -> None:
    """Print what is going to be trained, with the `record` of a run that begins or goes on; PacaError if its result
    does not fit on the disk."""
    width = max(len(label) for label, _ in plan.lines())
    for label, text in plan.lines():
        say(console, f"{label:<{width}}  {text}")
    tell_of_products(plan.config, plan.dtype, console, record)
    if lacks_weights(plan.config.model.name):
        told = f"{plan.config.model.name} holds no weights (such as *.safetensors). Copy them there before training."
        say(console, f"Warning: {told}", style="yellow")
    sample, context, settings = plan.data.sample, plan.data.context, plan.config.train
    for warning in (
        cut_warning(sample, context),
        context_warning(sample, settings, context),
        plan.told_of_trained(),
        plan.rate_warning(),
        patience_warning(settings, plan.steps),
    ):
        if warning is not None:
            say(console, f"Warning: {warning}", style="yellow")
    tell_of_disk(plan.disk, Path(plan.config.output.dir), console)


def planned_steps(examples: int, train: dict[str, Any], processes: int) -> int | None:
    """Optimizer steps over `examples` examples, counted as transformers' Trainer counts them.

    None where that depends on how many sequences packing makes of them.
    """
    if train.get("max_steps", -1) > 0:
        return train["max_steps"]
    return trainer_kind(train).steps(examples, train, processes)

"""What a run is described by: the sections of its YAML, and their keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from os.path import expanduser, isabs, lexists
from typing import Any, Literal

import yaml


@dataclass
class ModelSection:
    """Which model is trained."""

    name: str
    """A hub id, a folder that holds a checkpoint, or a GGUF file."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights in memory. `auto` is the checkpoint's own; with `full` float32, as in TRL."""
    adapter: str | None = None
    """A run's folder, an adapter's or a hub id to train on from, with its layers, columns, settings and tokenizer. What
    else it decides may be left out: the method's section, and `name`."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantize the weights as they are loaded (bitsandbytes); the trained columns stay in 16 bits and more."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """A hub id or a folder to take the tokenizer from, where it is not the model's own."""
    trust_remote_code: bool = False
    """Let a model from the hub run the Python code that it brings."""
    attn_implementation: str | None = None
    """How attention is computed, in transformers' words: `eager`, `sdpa`, `flash_attention_2`, ... When null,
    transformers chooses. On a CPU, `eager` may take a third of the time at short sequences, and more memory."""
    lean: bool = False
    """Blocks that keep less for the backward pass and compute the same: `paca.make_lean`."""
    recompute: Literal["mlp"] | None = None
    """With `lean`: also compute gate and up of each MLP again in the backward pass."""


@dataclass
class DataSection:
    """What it learns from."""

    train: str | list[str]
    """A JSONL, JSON, CSV or Parquet file, a folder, or a hub id; or a list of several, whose forms may differ."""
    eval: str | int | float | None = None
    """Held-out data: a file, a hub id, a fraction (0 < x < 1) or a count (≥ 1) of `train` to hold out, or null."""
    format: str | None = None
    """The form of the records; found out when null."""
    columns: dict[str, str] | None = None
    """Where columns have other names than a form knows: its name, and the data's, such as `{question: input}`."""
    template: str | None = None
    """The chat template: `alpaca`, `chatml`, `gemma`, `llama3`, `zephyr`, or a Jinja file. When null, the
    tokenizer's own; `alpaca` where it has none."""
    split: str = "train"
    """The split of `train` when that is a hub id, or a folder with files of several splits."""
    eval_split: str = "test"
    """The split of `eval`, as `split`."""
    limit: int | None = None
    """Use only this many records of `train`, of several sources of each (before any are held out)."""
    unusable: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of records from which nothing can be learned: no answer or an empty one, two equal ones, or one of
    which `train.max_length` leaves nothing."""
    label: str | None = None
    """For `train.trainer: image_classification`: the column with the label, where the data has several."""
    heldout_seed: int = 0
    """Which records a fraction or a count picks."""

    @property
    def sources(self) -> list[str]:
        """What `train` names."""
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def named(self) -> str:
        """The same for people."""
        return ", ".join(self.sources)


@dataclass
class CalibrationSection:
    """What columns are chosen by, where `paca.selection` goes by activations or gradients; and starts of LoRA."""

    sequences: int = 128
    """At most so many examples of the training data, spread evenly over it."""
    max_length: int = 128
    """Each cut to so many tokens: the first ones, or for `gradient_norm` the last, where the answer is."""
    batch_size: int = 8
    """How many run through the model at a time."""


@dataclass
class EvalSection:
    """When the held-out loss is measured, besides `train.eval_strategy`."""

    before: bool = True
    """Before the first step: the loss of the model as it came."""
    after: bool = True
    """After the last step."""
    limit: int | None = None
    """Use only this many held-out records, spread evenly over all of them."""
    metric: Literal["exact_match", "choice", "token_accuracy", "loss"] | None = None
    """Also score the held-out data as a task, for the model as it came and as it is trained, after the last step."""
    answer_pattern: str | None = None
    """For `exact_match`: a regular expression that finds the answer in what the model writes."""
    max_new_tokens: int = 256
    """With `metric`: the length at which an answer is cut."""

    @property
    def compared(self) -> str:
        """What of an answer `exact_match` compares, for people; nothing with the other metrics."""
        if self.metric != "exact_match":
            return ""
        return " of the whole answer" if self.answer_pattern is None else f" of what {self.answer_pattern} finds"


MEASURED_BY = ("eval.metric", "eval.answer_pattern", "eval.max_new_tokens")
"""What a trained model can still be measured by in another way."""


@dataclass
class OutputSection:
    """Where the results go."""

    dir: str
    """The run folder; `runs/` and the name of the config file when absent."""
    overwrite: bool = False
    """Start over in a folder that holds a run already, removing that run."""


SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "calibration": CalibrationSection,
    "eval": EvalSection,
    "output": OutputSection,
}
METHODS = ("paca", "lora", "peft", "full")
"""Sections of which a run has one. Their keys are the fields of PacaConfig, of LoraConfig, of the config that
`peft_type` names, and none."""
ALL = ("model", "data", *METHODS, "calibration", "train", "eval", "output")


@dataclass
class RunConfig:
    """A checked run, as the user wrote it: defaults are in place except those of the method and of `train`."""

    model: ModelSection
    data: DataSection
    calibration: CalibrationSection
    eval: EvalSection
    output: OutputSection
    method: str = "paca"
    """One of `METHODS`."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """The section of that name."""
    train: dict[str, Any] = field(default_factory=dict)
    """`trainer`, and fields of the settings of that trainer, such as `trl.SFTConfig`."""

    def as_dict(self) -> dict[str, Any]:
        """The sections as plain values, in the order of the documentation."""
        sections = self._sections()
        if self.data.unusable == "refuse":  # runs and comparisons from before it was there go on
            del sections["data"]["unusable"]
        if self.data.columns is None:
            del sections["data"]["columns"]
        if self.model.adapter is None:
            del sections["model"]["adapter"]
        return sections

    def to_yaml(self) -> str:
        """The text of a config file that gives this run again."""
        return yaml.safe_dump(self._sections(), sort_keys=False, allow_unicode=True, width=120)

    def paths_used(self) -> Iterator[tuple[str, str]]:
        """The keys that name files and folders which the run reads, with these names."""
        for section, values in self._sections().items():
            for key, value in {} if section == "output" else values.items():
                names = value if isinstance(value, list) else [value]
                # `load_run_config` made them absolute; whoever changed some since may have named them otherwise.
                there = _is_there if f"{section}.{key}" in _OF_FILES else isabs
                yield from ((f"{section}.{key}", one) for one in names if isinstance(one, str) and there(one))

    def _sections(self) -> dict[str, Any]:
        sections = {**dataclasses.asdict(self), self.method: self.adapter}
        return {name: sections[name] for name in ALL if name in sections}


_OF_FILES = ("model.name", "model.tokenizer", "data.train", "data.eval", "train.reward_funcs", "paca.original_weights")


def _is_there(name: str) -> bool:
    try:
        return lexists(expanduser(name))
    except ValueError:  # null characters
        return False

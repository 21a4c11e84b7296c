"""The YAML of a run: its sections, and the checks that come before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.training.key_checks import Origins, check_section
from paca.training.strict_yaml import parse_value, read_yaml
from paca.training.typed_values import shown


@dataclass
class ModelSection:
    """Which model is trained."""

    name: str
    """A hub id, a folder that holds a checkpoint, or a GGUF file."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights in memory. ``auto`` is the checkpoint's own; with ``full`` float32, as in TRL."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantize the weights as they are loaded (bitsandbytes); the trained columns stay in 16 bits and more."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """A hub id or a folder to take the tokenizer from, where it is not the model's own."""
    trust_remote_code: bool = False
    """Let a model from the hub run the Python code that it brings."""
    lean: bool = False
    """Blocks that keep less for the backward pass and compute the same: :func:`paca.make_lean`."""
    recompute: Literal["mlp"] | None = None
    """With ``lean``: also compute gate and up of each MLP again in the backward pass."""


@dataclass
class DataSection:
    """What it learns from."""

    train: str
    """A JSONL, JSON, CSV or Parquet file, or a hub id."""
    eval: str | int | float | None = None
    """Held-out data: a file, a hub id, a fraction (0 < x < 1) or a count (≥ 1) of ``train`` to hold out, or null."""
    format: str | None = None
    """The form of the records; found out when null."""
    template: str | None = None
    """The chat template: ``alpaca``, ``chatml``, ``gemma``, ``llama3``, ``zephyr``, or a Jinja file. When null, the
    tokenizer's own; ``alpaca`` where it has none."""
    split: str = "train"
    """The split of ``train`` when that is a hub id."""
    eval_split: str = "test"
    """The split of ``eval`` when that is a hub id."""
    limit: int | None = None
    """Use only this many records of ``train`` (before any are held out)."""
    heldout_seed: int = 0
    """Which records a fraction or a count picks."""


@dataclass
class CalibrationSection:
    """What columns are chosen by, where ``paca.selection`` goes by activations or gradients."""

    sequences: int = 128
    """At most so many examples of the training data, spread evenly over it."""
    max_length: int = 128
    """Each cut to so many tokens: the first ones, or for ``gradient_norm`` the last, where the answer is."""
    batch_size: int = 8
    """How many run through the model at a time."""


@dataclass
class EvalSection:
    """When the held-out loss is measured, besides ``train.eval_strategy``."""

    before: bool = True
    """Before the first step: the loss of the model as it came."""
    after: bool = True
    """After the last step."""
    limit: int | None = None
    """Use only this many held-out records."""
    metric: Literal["exact_match", "choice", "token_accuracy", "loss"] | None = None
    """Also score the held-out data as a task, for the model as it came and as it is trained, after the last step."""
    answer_pattern: str | None = None
    """For ``exact_match``: a regular expression that finds the answer in what the model writes."""
    max_new_tokens: int = 256
    """With ``metric``: the length at which an answer is cut."""


@dataclass
class OutputSection:
    """Where the results go."""

    dir: str
    """The run folder; ``runs/`` and the name of the config file when absent."""
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
_ALL = ("model", "data", *METHODS, "calibration", "train", "eval", "output")


@dataclass
class RunConfig:
    """A checked run, as the user wrote it: defaults are in place except those of the method and of ``train``."""

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
    """Fields of ``trl.SFTConfig``."""

    def as_dict(self) -> dict[str, Any]:
        """The sections as plain values, in the order of the documentation."""
        sections = {**dataclasses.asdict(self), self.method: self.adapter}
        return {name: sections[name] for name in _ALL if name in sections}

    def to_yaml(self) -> str:
        """The text of a config file that gives this run again."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=120)


def load_run_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check the config of a run.

    Args:
        path: A YAML file with the sections model, data, one of `METHODS`, calibration, train, eval and output.
        overrides: ``"section.key=value"`` each; the value is read as YAML.

    Returns:
        The run. Paths that exist are made absolute, so that the resolved config runs from anywhere.

    Raises:
        PacaError: A missing or unreadable file, an unknown or repeated key, a wrong type, a missing required key, two
            methods.
    """
    path = Path(path)
    sections, origins = _read_sections(path, overrides)
    method = _method(sections, origins)
    built: dict[str, Any] = {}
    sections["output"].setdefault("dir", os.path.join("runs", path.stem))
    for name, section_type in SECTIONS.items():
        built[name] = _build_section(name, section_type, sections[name], origins)
    config = RunConfig(**built, method=method, adapter=sections[method], train=sections["train"])
    for key, problem in _problems(config):
        raise PacaError(f"{origins.of(key)}: {key} {problem}")

    # Only now: these two import peft and trl, which takes seconds that the mistakes above need not cost.
    from paca.training.adapter_settings import adapter_fields, check_adapter_settings
    from paca.training.train_settings import OWN, check_train_settings, train_fields

    check_adapter_settings(method, sections[method], origins, {"train": [*train_fields(), *OWN]})
    check_train_settings(sections["train"], origins, {method: adapter_fields(method, sections[method])})
    _make_paths_absolute(config)
    return config


def _read_sections(path: Path, overrides: Iterable[str]) -> tuple[dict[str, dict[str, Any]], Origins]:
    content, lines = read_yaml(path)
    origins = Origins(path, lines)
    if content is None:
        raise PacaError(f"{path} is empty; it needs at least model.name and data.train.")
    if not isinstance(content, dict):
        raise PacaError(f"{path} must hold sections (model:, data:, ...), not {shown(content)}.")
    names = list(_ALL)
    for name, values in content.items():
        if name not in names:
            raise PacaError(f"{origins.of(name)}: there is no section {name!r}.{_section_hint(name, names)}")
        if values is not None and not isinstance(values, dict):
            raise PacaError(f"{origins.of(name)}: the section {name} must hold keys, not {shown(values)}.")
    sections: dict[str, dict[str, Any]] = {
        name: dict(content.get(name) or {}) for name in names if name in content or name not in METHODS
    }
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if not separator or not dot or not name:
            raise PacaError(f"--set {override}: expected section.key=value, such as --set train.learning_rate=1e-4.")
        if section not in names:
            raise PacaError(f"--set {override}: there is no section {section!r}.{_section_hint(section, names)}")
        try:
            sections.setdefault(section, {})[name] = parse_value(text)
        except PacaError as error:
            raise PacaError(f"--set {override}: {error}") from error
        origins.overridden.add(f"{section}.{name}")
    return sections, origins


def _method(sections: dict[str, dict[str, Any]], origins: Origins) -> str:
    """The method whose section is there; `paca`, whose section is made, without one."""
    given = [name for name in METHODS if name in sections]
    if len(given) > 1:
        places = " and ".join(f"{name} ({origins.of_section(name)})" for name in given)
        raise PacaError(f"{origins.path}: a run has one method, and these are given: {places}. Keep one of them.")
    if not given:
        sections["paca"] = {}
    return given[0] if given else "paca"


def _build_section(name: str, section_type: type, values: dict[str, Any], origins: Origins) -> Any:
    annotations = typing.get_type_hints(section_type)
    elsewhere = {other: typing.get_type_hints(kind) for other, kind in SECTIONS.items() if other != name}
    check_section(name, values, annotations, origins, elsewhere=elsewhere)
    for option in dataclasses.fields(section_type):
        if option.name not in values and option.default is dataclasses.MISSING:
            raise PacaError(f"{origins.path}: {name}.{option.name} is missing; it must be given.")
    return section_type(**values)


def _problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Values that can't work, alone or with others: the key, and what is wrong with it."""
    model, data, evaluation, train = config.model, config.data, config.eval, config.train
    if isinstance(data.eval, float) and not 0 < data.eval < 1:
        yield (
            "data.eval",
            f"is {data.eval}; to hold out a part of data.train give a fraction between 0 and 1 or a whole number of "
            "records.",
        )
    for key, count in (("data.eval", data.eval), ("data.limit", data.limit), ("eval.limit", evaluation.limit)):
        if isinstance(count, int) and count < 1:
            yield key, f"is {count}; a count of records must be 1 or more."
    if evaluation.metric is not None and data.eval is None:
        yield "eval.metric", "is measured on held-out data; give data.eval too."
    if evaluation.answer_pattern is not None and evaluation.metric != "exact_match":
        yield "eval.answer_pattern", "goes with eval.metric: exact_match. Leave it out."
    counts = {f"calibration.{name}": count for name, count in dataclasses.asdict(config.calibration).items()}
    for key, count in {"eval.max_new_tokens": evaluation.max_new_tokens, **counts}.items():
        if count < 1:
            yield key, f"is {count}; it must be 1 or more."
    if model.recompute is not None and not model.lean:
        yield "model.recompute", "is a part of the lean blocks; give model.lean: true too."
    if model.lean and train.get("use_liger_kernel"):
        yield (
            "train.use_liger_kernel",
            "replaces the blocks that model.lean makes lean. Choose one of them; on CUDA, lean blocks use Liger's "
            "kernels where they are installed.",
        )
    if config.method == "full" and model.quantization is not None:
        yield (
            "model.quantization",
            "does not go with full: quantized weights can't be trained themselves. Leave it out, or train an adapter "
            "on them: paca, lora or peft.",
        )
    if config.method == "full" and "autocast_adapter_dtype" in train:
        yield (
            "train.autocast_adapter_dtype",
            "is about adapters, and full has none. Leave it out; model.dtype is the type of the weights.",
        )


def _make_paths_absolute(config: RunConfig) -> None:
    config.model.name = _absolute_where_it_exists(config.model.name)
    if config.model.tokenizer is not None:
        config.model.tokenizer = _absolute_where_it_exists(config.model.tokenizer)
    config.data.train = _absolute_where_it_exists(config.data.train)
    if config.data.template is not None and Path(config.data.template).suffix:  # a file, not a name
        config.data.template = _absolute_where_it_exists(config.data.template)
    if isinstance(config.data.eval, str):
        config.data.eval = _absolute_where_it_exists(config.data.eval)
    config.output.dir = os.path.abspath(os.path.expanduser(config.output.dir))


def _absolute_where_it_exists(name: str) -> str:
    expanded = os.path.expanduser(name)
    return os.path.abspath(expanded) if os.path.exists(expanded) else name


def _section_hint(name: str, names: list[str]) -> str:
    return did_you_mean(name, names, "{}") or f" The sections are {', '.join(names)}."

"""The YAML of a run, read and checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.training.config.early_checks import check_early
from paca.training.config.key_checks import Mistakes, Origins, check_section
from paca.training.config.overrides import FIRST, apply_overrides, section_hint
from paca.training.config.run_config import ALL, METHODS, SECTIONS, RunConfig
from paca.training.config.strict_yaml import read_yaml
from paca.training.config.typed_values import shown


def load_run_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check the config of a run.

    Args:
        path: A YAML file with the sections model, data, one of `METHODS`, calibration, train, eval and output.
        overrides: `"section.key=value"` each; the value is read as YAML. `"section.key.name=value"` sets one entry of a
            key that holds several. `"paca=null"` leaves a method's section out.

    Returns:
        The run. Paths that exist are made absolute, so that the resolved config runs from anywhere.

    Raises:
        PacaError: A missing or unreadable file, an unknown or repeated key, a wrong type, a missing required key, two
            methods. Of mistakes that do not depend on each other, all are told.
    """
    path = Path(path)
    sections, origins = _read_sections(path, overrides)
    method = _method(sections, origins)
    built: dict[str, Any] = {}
    origins.keys_of_all = partial(_keys_of_all, method, sections)
    sections["output"].setdefault("dir", os.path.join("runs", path.stem))
    mistakes = Mistakes()
    for name, section_type in SECTIONS.items():
        with mistakes.noted():
            built[name] = _build_section(name, section_type, sections[name], origins)
    with mistakes.noted():
        check_early(method, sections, origins)
    mistakes.tell()
    config = RunConfig(**built, method=method, adapter=sections[method], train=sections["train"])
    _refuse(_problems(config), origins)
    # Only now: what follows imports peft and trl, which takes seconds that the mistakes above need not cost.
    from paca.training.config.adapter_settings import check_adapter_settings
    from paca.training.config.train_settings import check_train_settings

    mistakes = Mistakes()
    with mistakes.noted():
        check_adapter_settings(method, sections[method], origins)
    with mistakes.noted():
        check_train_settings(sections["train"], origins)
    mistakes.tell()
    _refuse(_problems_with_trainer(config), origins)
    _make_paths_absolute(config)
    return config


def _read_sections(path: Path, overrides: Iterable[str]) -> tuple[dict[str, dict[str, Any]], Origins]:
    content, lines = read_yaml(path)
    origins = Origins(path, lines)
    if content is None:
        raise PacaError(f"{path} is empty; it needs at least model.name and data.train.")
    if not isinstance(content, dict):
        raise PacaError(f"{path} must hold sections (model:, data:, ...), not {shown(content)}.")
    names = list(ALL)
    mistakes = Mistakes()
    for name, values in content.items():
        with mistakes.noted():
            if name not in names:
                raise PacaError(f"{origins.of(name)}: there is no section {name!r}.{section_hint(name, names)}")
            if values is not None and not isinstance(values, dict):
                form = f" Give it as {name}: {{{FIRST[name]}: {values}}}" if name in FIRST else ""
                raise PacaError(f"{origins.of(name)}: the section {name} must hold keys, not {shown(values)}.{form}")
    mistakes.tell()
    sections: dict[str, dict[str, Any]] = {
        name: dict(content.get(name) or {}) for name in names if name in content or name not in METHODS
    }
    apply_overrides(sections, overrides, origins, lambda: _keys_of_all(_first_method(sections), sections))
    return sections, origins


def _first_method(sections: dict[str, dict[str, Any]]) -> str:
    return next((name for name in METHODS if sections.get(name)), "paca")


def _method(sections: dict[str, dict[str, Any]], origins: Origins) -> str:
    """The method whose section is there; `paca`, whose section is made, without one."""
    given = [name for name in METHODS if name in sections]
    if len(given) > 1:
        places = " and ".join(f"{name} ({origins.of_section(name)})" for name in given)
        raise PacaError(
            f"{origins.path}: a run has one method, and these are given: {places}. Keep one of them; --set "
            f"{given[0]}=null leaves {given[0]} out."
        )
    if not given:
        sections["paca"] = {}
    return given[0] if given else "paca"


def _keys_of_all(method: str, sections: dict[str, dict[str, Any]]) -> dict[str, Iterable[str]]:
    """The keys of each section, those first that are meant more often."""
    from paca.training.config.adapter_settings import adapter_fields
    from paca.training.config.train_settings import keys_of
    from paca.training.trainers import TRAINERS

    try:
        fields = adapter_fields(method, sections[method])
    except (KeyError, ValueError):  # `peft_type` is missing or wrong, which is not yet checked
        fields = {}
    methods: dict[str, Iterable[str]] = {name: adapter_fields(name, {}) for name in ("paca", "lora")}
    adapter = {"paca": methods["paca"]} if method == "full" else {method: fields}
    trainer = sections["train"].get("trainer")
    others: dict[str, Iterable[str]] = {name: typing.get_type_hints(kind) for name, kind in SECTIONS.items()}
    calibration = others.pop("calibration")
    train = keys_of(trainer if trainer in TRAINERS else "sft")
    return {**adapter, **others, "train": train, "calibration": calibration, **methods}


def _build_section(name: str, section_type: type, values: dict[str, Any], origins: Origins) -> Any:
    annotations = typing.get_type_hints(section_type)
    check_section(name, values, annotations, origins)
    for option in dataclasses.fields(section_type):
        if option.name not in values and option.default is dataclasses.MISSING:
            raise PacaError(f"{origins.path}: {name}.{option.name} is missing; it must be given.")
    return section_type(**values)


def _refuse(problems: Iterator[tuple[str, str]], origins: Origins) -> None:
    mistakes = Mistakes()
    for key, problem in problems:
        with mistakes.noted():
            raise PacaError(f"{origins.of(key)}: {key} {problem}")
    mistakes.tell()


def _problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Values that can't work, alone or with others: the key, and what is wrong with it."""
    model, data, evaluation, train = config.model, config.data, config.eval, config.train
    saves_best = train.get("save_strategy") == "best"
    if isinstance(data.eval, float) and not 0 < data.eval < 1:
        yield (
            "data.eval",
            f"is {data.eval}; to hold out a part of data.train give a fraction between 0 and 1 or a whole number of "
            "records.",
        )
    if not data.sources:
        yield "data.train", "is an empty list; name at least one file, folder or hub id."
    for key, count in (("data.eval", data.eval), ("data.limit", data.limit), ("eval.limit", evaluation.limit)):
        if isinstance(count, int) and count < 1:
            yield key, f"is {count}; a count of records must be 1 or more."
    if evaluation.metric is not None and data.eval is None:
        yield "eval.metric", "is measured on held-out data; give data.eval too."
    for key, needs in (("load_best_model_at_end", train.get("load_best_model_at_end")), ("save_strategy", saves_best)):
        if needs and data.eval is None:
            yield f"train.{key}", f"is {train[key]}: the best one is that of held-out data. Give data.eval too."
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
    if train.get("factor_rank") is not None:
        if config.method != "paca":
            yield (
                "train.factor_rank",
                f"is about PaCA's deltas, and {config.method} has none. Leave it out; to compare methods, give it in a "
                "file of its own (--methods paca,factored=FILE,lora).",
            )
        elif train.get("optim_args") or train.get("optim_target_modules"):
            yield "train.factor_rank", "takes none of train.optim_args and train.optim_target_modules. Leave them out."
        elif train.get("optim", "adamw_torch") not in ("adamw_torch", "adamw_torch_fused"):
            yield "train.factor_rank", f"is AdamW's, and train.optim is {train['optim']}. Leave one of them out."
    if config.method == "full" and "autocast_adapter_dtype" in train:
        yield (
            "train.autocast_adapter_dtype",
            "is about adapters, and full has none. Leave it out; model.dtype is the type of the weights.",
        )


def _problems_with_trainer(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The same of other sections, which the run's trainer has no use for, or can't work with."""
    from paca.columns.selection import FROM_BATCHES
    from paca.pretrained.changed_base import left_by
    from paca.training.trainers import trainer_kind

    kind = trainer_kind(config.train)
    if config.data.columns is not None and kind.name == "image_classification":
        yield "data.columns", "is for texts; of images data.label names the column with the label. Leave it out."
    if not isinstance(config.data.train, str) and kind.name == "image_classification":
        yield "data.train", "is a list; of images give one folder, Parquet file or hub id."
    if config.data.label is not None and kind.name != "image_classification":
        yield "data.label", f"goes with train.trainer: image_classification, not {kind.name}. Leave it out."
    if config.data.template is not None and not kind.renders:
        yield "data.template", f"has no effect with train.trainer: {kind.name}. Leave it out."
    best = str(config.train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if config.data.eval is not None and kind.measured is not None and best not in kind.measured:
        yield (
            "train.metric_for_best_model",
            f"is {best}, and what is measured while training is {', '.join(kind.measured)}. Give one of them; "
            "eval.metric is measured once, after the last step.",
        )
    if config.eval.metric is not None and kind.score is not None:
        yield "eval.metric", f"goes with train.trainer: sft; {kind.name} measures {kind.score}. Leave it out."
    held_against = kind.name == "dpo" or (kind.name == "grpo" and config.train.get("beta"))
    if held_against and (changed := left_by(config.adapter)) is not None:
        yield (
            f"{config.method}.{changed.partition(':')[0].partition(' ')[0]}",
            f"does not go with train.trainer: {kind.name}, whose reference is the model without its adapter: "
            f"{changed}. Leave it out.",
        )
    selection = config.adapter.get("selection") if config.method == "paca" else None
    if selection in FROM_BATCHES and kind.name != "sft":
        yield (
            "paca.selection",
            f"is {selection}, which goes by batches as train.trainer: sft makes them. For {kind.name} choose "
            "random_blocks, random or weight_norm, or give paca.indices.",
        )
    if config.model.quantization is not None and kind.task_type != "CAUSAL_LM":
        yield (
            "model.quantization",
            f"does not go with train.trainer: {kind.name}, whose new head would be quantized before it is trained. "
            "Leave it out.",
        )


def _make_paths_absolute(config: RunConfig) -> None:
    from paca.training.config.train_settings import keys_of_files

    config.model.name = _absolute_where_it_exists(config.model.name)
    if config.model.tokenizer is not None:
        config.model.tokenizer = _absolute_where_it_exists(config.model.tokenizer)
    sources = [*map(_absolute_where_it_exists, config.data.sources)]
    config.data.train = sources[0] if isinstance(config.data.train, str) else sources
    if config.data.template is not None and Path(config.data.template).suffix:  # a file, not a name
        config.data.template = _absolute_where_it_exists(config.data.template)
    if isinstance(config.data.eval, str):
        config.data.eval = _absolute_where_it_exists(config.data.eval)
    files = {"original_weights": config.adapter, "tokenizer_name_or_path": config.adapter}
    for key, section in {**files, **dict.fromkeys(keys_of_files(config.train), config.train)}.items():
        if isinstance(name := section.get(key), str):
            section[key] = _absolute_where_it_exists(name)
    rewards = config.train.get("reward_funcs")
    if rewards is not None:  # some may be folders of reward models
        names = [rewards] if isinstance(rewards, str) else rewards
        config.train["reward_funcs"] = [_absolute_where_it_exists(name) for name in names]
    config.output.dir = os.path.abspath(os.path.expanduser(config.output.dir))


def _absolute_where_it_exists(name: str) -> str:
    expanded = os.path.expanduser(name)
    return os.path.abspath(expanded) if os.path.exists(expanded) else name

"""The YAML of a run, read and checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.nearest import nearest
from paca.training.config.contradictions import contradictions, contradictions_with_trainer, unused
from paca.training.config.early_checks import REFUSED_EARLY, check_early, may_be_wrong, missing_paths, paca_keys
from paca.training.config.key_checks import OTHER_WORDS, WORDS_OF_TRAIN, Mistakes, Origins, check_section
from paca.training.config.overrides import FIRST, apply_overrides, section_hint
from paca.training.config.run_config import (
    ALL,
    METHODS,
    SECTIONS,
    CalibrationSection,
    DataSection,
    EvalSection,
    ModelSection,
    OutputSection,
    RunConfig,
)
from paca.training.config.strict_yaml import read_yaml
from paca.training.config.typed_values import shown


def load_run_config(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    to_train: bool = False,
    all_used: bool = False,
    check: Callable[[RunConfig], None] | None = None,
) -> RunConfig:
    """Read and check the config of a run.

    Args:
        path: A YAML file with the sections model, data, one of `METHODS`, calibration, train, eval and output.
        overrides: `"section.key=value"` each; the value is read as YAML. `"section.key.name=value"` sets one entry of a
            key that holds several. `"paca=null"` leaves a method's section out.
        to_train: Model and data are needed: refuse paths where nothing is.
        all_used: Refuse a `calibration` that nothing in the run goes by. In a comparison it may be another method's.
        check: Called with the run before PEFT and TRL are imported, to refuse it at once.

    Returns:
        The run. Paths that exist are made absolute, so that the resolved config runs from anywhere.

    Raises:
        PacaError: A missing or unreadable file, an unknown or repeated key, a wrong type, a missing required key, two
            methods. Of mistakes that do not depend on each other, all are told.
    """
    path = Path(path)
    mistakes = Mistakes()
    sections, origins = _read_sections(path, overrides, mistakes)
    if isinstance(sections["model"].get("adapter"), str):
        from paca.training.config.first_adapter import take_adapter

        with mistakes.noted():
            take_adapter(sections, origins)
    whole = not mistakes  # else what seems to be missing may stand in what there is no section for
    method = next((name for name in METHODS if name in sections), "paca")
    with mistakes.noted():
        _check_one_method(sections, origins)
    sections.setdefault(method, {})
    built: dict[str, Any] = {}
    origins.keys_of_all = partial(_keys_of_all, method, sections)
    sections["output"].setdefault("dir", os.path.join("runs", path.stem))
    for name, section_type in SECTIONS.items():
        with mistakes.noted():
            check_section(name, sections[name], typing.get_type_hints(section_type), origins)
            if whole:
                built[name] = _build_section(name, section_type, sections[name], origins)
    with mistakes.noted():
        check_early(method, sections, origins)
    for key, problem in missing_paths(sections) if to_train else ():
        with mistakes.noted():
            raise PacaError(f"{origins.of(key)}: {key}: {problem}")
    if built.keys() == SECTIONS.keys():
        config = RunConfig(**built, method=method, adapter=sections[method], train=sections["train"])
        with mistakes.noted():
            _refuse(contradictions(config), origins)
    train = {name: value for name, value in sections["train"].items() if name not in REFUSED_EARLY}
    suspect = bool(mistakes) and may_be_wrong(train)
    if mistakes and not suspect and (not sections[method] or method == "paca"):  # whose keys are checked already
        mistakes.tell()
    if check is not None and not mistakes:
        check(config)
    # Only now: what follows imports peft and trl, which takes seconds that the mistakes above need not cost.
    from paca.training.config.adapter_settings import check_adapter_settings

    alone = not mistakes
    with mistakes.noted():
        check_adapter_settings(method, sections[method], origins)
    if alone or suspect:
        from paca.training.config.train_settings import check_train_settings

        with mistakes.noted():
            check_train_settings(train, origins)
    mistakes.tell()
    _refuse(contradictions_with_trainer(config), origins)
    if all_used:
        _refuse(unused(config), origins)
    _make_paths_absolute(config)
    return config


def config_without_run(
    model: str, data: str, columns: dict[str, str] | None = None, overrides: Iterable[str] = ()
) -> RunConfig:
    """The config for measuring an adapter or a model that no run left.

    Args:
        model: A folder or a hub id.
        data: A file, a folder or a hub id: what it is measured on.
        columns: As `data.columns`.
        overrides: `"eval.key=value"` each.

    Raises:
        PacaError: An override is wrong.
    """
    sections: dict[str, dict[str, Any]] = {"eval": {}}
    origins = Origins(Path("--set"), {})
    apply_overrides(sections, overrides, origins, lambda: [("eval", typing.get_type_hints(EvalSection))])
    parts = ModelSection(model), DataSection(data, eval=data, columns=columns), CalibrationSection()
    check_section("eval", sections["eval"], typing.get_type_hints(EvalSection), origins)
    config = RunConfig(*parts, EvalSection(**sections["eval"]), OutputSection(""))
    _refuse(contradictions(config), origins)
    return config


def _read_sections(
    path: Path, overrides: Iterable[str], mistakes: Mistakes
) -> tuple[dict[str, dict[str, Any]], Origins]:
    """What can be read; the mistakes are noted. One whose name is misspelt counts as the one that is meant."""
    content, lines = read_yaml(path)
    origins = Origins(path, lines)
    if content is None:
        raise PacaError(f"{path} is empty; it needs at least model.name and data.train.")
    if not isinstance(content, dict):
        raise PacaError(f"{path} must hold sections (model:, data:, ...), not {shown(content)}.")
    names = list(ALL)
    given: dict[str, dict[str, Any]] = {}
    for name, values in content.items():
        with mistakes.noted():
            if name not in names:
                meant = nearest(name, [other for other in names if other not in content], cutoff=0.75)
                if meant is not None and isinstance(values, dict):
                    given[meant] = values
                    origins.rename(name, meant)
                hint = _OF_OTHERS.get(name) or ("" if isinstance(values, dict) else _section_of(name))
                raise PacaError(f"{origins.of(name)}: there is no section {name!r}.{hint or section_hint(name, names)}")
            if values is not None and not isinstance(values, dict):
                form = f" Give it as {name}: {{{FIRST[name]}: {values}}}" if name in FIRST else ""
                raise PacaError(f"{origins.of(name)}: the section {name} must hold keys, not {shown(values)}.{form}")
            given[name] = dict(values or {})
    sections: dict[str, dict[str, Any]] = {
        name: given.get(name, {}) for name in names if name in given or name not in METHODS
    }
    for override in overrides:
        with mistakes.noted():
            apply_overrides(sections, [override], origins, lambda: _keys_of_all(_first_method(sections), sections))
    return sections, origins


_OF_OTHERS = {
    "adapter": " The method is a section: paca:, lora:, peft: or full:. Leave it out for PaCA.",
    "base_model": " Did you mean the key model.name? It stands below model:",
    "datasets": " Did you mean the key data.train? It stands below data:",
    "lora_alpha": " Did you mean the key lora.lora_alpha? It stands below lora:",
    "lora_r": " Did you mean the key lora.r? It stands below lora:",
    "model_name_or_path": " Did you mean the key model.name? It stands below model:",
    "sequence_len": " Did you mean the key train.max_length? It stands below train:",
}
"""What keys of other programs mean that stand at the top of their files."""


def _section_of(key: str) -> str:
    """A hint for a key that stands where sections do, and nothing if no section has it."""
    key = OTHER_WORDS.get(key, key)
    owners = _keys_of_all("paca", {name: {} for name in ALL})
    return next(
        (f" Did you mean the key {owner}.{key}? It stands below {owner}:" for owner, keys in owners if key in keys), ""
    )


def _first_method(sections: dict[str, dict[str, Any]]) -> str:
    return next((name for name in METHODS if sections.get(name)), "paca")


def _check_one_method(sections: dict[str, dict[str, Any]], origins: Origins) -> None:
    given = [name for name in METHODS if name in sections]
    if len(given) > 1:
        places = " and ".join(f"{name} ({origins.of_section(name)})" for name in given)
        raise PacaError(
            f"{origins.path}: a run has one method, and these are given: {places}. Keep one of them; --set "
            f"{given[0]}=null leaves {given[0]} out."
        )


def _keys_of_all(method: str, sections: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Iterable[str]]]:
    """Each section and its keys, those first that are meant more often; of `dict()`, once each.

    Whoever stops at a match may not have to wait for PEFT and TRL.
    """
    others: dict[str, Iterable[str]] = {name: typing.get_type_hints(kind) for name, kind in SECTIONS.items()}
    calibration = others.pop("calibration")
    if method in ("paca", "full"):
        yield "paca", paca_keys()
        yield from others.items()
        yield "train", WORDS_OF_TRAIN.values()

    from paca.training.config.adapter_settings import adapter_fields
    from paca.training.config.train_settings import keys_of
    from paca.training.trainers import TRAINERS

    if method == "full":  # has no keys
        yield "paca", adapter_fields("paca", {})
    else:
        try:
            yield method, adapter_fields(method, sections[method])
        except (KeyError, ValueError):  # `peft_type` is missing or wrong, which is not yet checked
            yield method, {}
    yield from others.items()
    trainer = sections["train"].get("trainer")
    yield "train", keys_of(trainer if trainer in TRAINERS else "sft")
    yield "calibration", calibration
    yield from ((name, adapter_fields(name, {})) for name in ("paca", "lora"))


def _build_section(name: str, section_type: type, values: dict[str, Any], origins: Origins) -> Any:
    for option in dataclasses.fields(section_type):
        if option.name not in values and option.default is dataclasses.MISSING:
            raise PacaError(f"{origins.path}: {name}.{option.name} is missing; it must be given.")
    return section_type(**values)


def _refuse(problems: Iterator[tuple[str, str]], origins: Origins) -> None:
    mistakes = Mistakes()
    for key, problem in problems:
        with mistakes.noted():
            place = origins.of(key) if "." in key else origins.of_section(key)
            raise PacaError(f"{place}: {key} {problem}")
    mistakes.tell()


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

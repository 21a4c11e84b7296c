"""The method's section of a run: the fields of a PEFT config that a user sets, and what PEFT makes of them."""

from __future__ import annotations

import copy
import dataclasses
import enum
import re
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from peft import LoftQConfig, LoraConfig, PeftConfig, ShiraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from paca.columns.selection import FROM_BATCHES
from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.messages.install import how_to_install
from paca.messages.nearest import did_you_mean
from paca.pretrained.changed_base import not_saved
from paca.pretrained.foreign_methods import refused
from paca.training.config.key_checks import Origins, check_section
from paca.training.config.typed_values import choices, matches, shown

NOT_HERE = {
    "FROD": "it is laid out from the weights at each load, and in another dtype what was trained does not come back",
    "MULTITASK_PROMPT_TUNING": "PEFT wants the task of each record, and a run's data names none",
    "POLY": "PEFT wants the task of each record, and a run's data names none",
    "XLORA": "it mixes adapters that are trained already",
}
"""Methods of PEFT that a run can't train, and why: each was tried (PEFT 0.21.2)."""

_PARTS_NOT_HERE = {
    "arrow_config": "it mixes adapters that are trained already",
    "monteclora_config": "TRL's trainer does not add its loss, and checkpoints lack what it has drawn ahead",
    "use_asa": "checkpoints lack what it goes by",
}
"""The same of fields."""

_STEPS_OF_THE_RUN = 2**53
"""AdaLoRA's `total_step` until the trainer knows its steps, where none is given: PEFT wants a number."""

FROM_DATA = ("eva", "corda", "lora_ga")
"""Starts of LoRA that a run makes by a pass over its training data."""
_OF_STARTS = tuple(f"{start}_config" for start in FROM_DATA)
_NOT_LISTED = re.compile(r"pissa_niter_\d+")
"""Starts that PEFT knows, and can't list in its config's annotation."""


def adapter_fields(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name and type of each key of the section: the fields of its config that are not bookkeeping."""
    if method == "full":
        return {}
    kind = config_type(method, settings)
    bookkeeping = {option.name for option in dataclasses.fields(PeftConfig)} | {"base_quantization", "runtime_config"}
    annotations = typing.get_type_hints(kind)
    fields = {
        option.name: annotations[option.name]
        for option in dataclasses.fields(kind)
        if option.init and option.name not in bookkeeping
    }
    if method == "lora":
        fields["init_lora_weights"] |= Literal["lora_ga"]  # which PEFT leaves out of its annotation
    return {"peft_type": str, **fields} if method == "peft" else fields


def config_type(method: str, settings: Mapping[str, Any]) -> type[PeftConfig]:
    """The class of the config: `PacaConfig`, `LoraConfig`, or the one that `peft_type` names."""
    if method == "peft":
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings["peft_type"])]
    return {"paca": PacaConfig, "lora": LoraConfig}[method]


def check_adapter_settings(method: str, settings: dict[str, Any], origins: Origins) -> None:
    """Check the keys, types and values of the section.

    Args:
        method: Its name.
        settings: What was given; `peft_type` becomes upper case.
        origins: Where.

    Raises:
        PacaError: An unknown key, a wrong type, a value that the config refuses, or one with which paca would not
            load the result.
    """
    if method == "peft":
        settings["peft_type"] = _peft_type(settings, origins)
    fields = adapter_fields(method, settings)
    start = str(settings.get("init_lora_weights"))
    known = _NOT_LISTED.fullmatch(start) is not None
    check_section(method, {**settings, "init_lora_weights": True} if known else settings, fields, origins)
    for name, value in settings.items():
        if isinstance(value, dict) and (kind := _kind_within(fields[name])) is not None:
            check_section(f"{method}.{name}", value, typing.get_type_hints(kind), origins)  # PEFT skips unknown ones
    if method != "lora" and is_made(settings):
        raise PacaError(
            f"{origins.of(f'{method}.init_lora_weights')}: {method}.init_lora_weights: {start} is a start of plain "
            "LoRA, which has a section of its own, lora. Leave it out, or use that one."
        )
    for name in (name for name in _PARTS_NOT_HERE if settings.get(name) not in (None, False)):
        place = origins.of(f"{method}.{name}")
        raise PacaError(f"{place}: {method}.{name} can't be trained here: {_PARTS_NOT_HERE[name]}. Leave it out.")
    for name, reason in refused(settings):
        raise PacaError(
            f"{origins.of(f'{method}.{name}')}: {method}.{name} can't be trained here: paca chat, evaluate and merge "
            f"load no adapter that sets it, as {reason}. Leave it out, or train with PEFT."
        )
    try:
        adapter_config(method, settings)
    except (ValueError, TypeError) as error:
        named = re.match(r"\w*", str(error))
        if named is not None and named[0] in settings:
            raise PacaError(f"{origins.of(f'{method}.{named[0]}')}: {method}.{error}") from error
        raise PacaError(f"{origins.path}, section {method}: {error}") from error


def _kind_within(annotation: Any) -> type | None:
    """The dataclass that a field takes, of one that takes no other mapping."""
    kinds = (annotation, *typing.get_args(annotation))
    within = (kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind))
    return None if dict in kinds else next(within, None)


def is_start(name: str) -> bool:
    """Whether LoRA's `init_lora_weights` takes such a name."""
    return _NOT_LISTED.fullmatch(name) is not None or name in choices(adapter_fields("lora", {})["init_lora_weights"])


def is_made(settings: Mapping[str, Any]) -> bool:
    """Whether a run makes the adapter's start itself, and keeps it."""
    return settings.get("init_lora_weights") in FROM_DATA or not_saved(settings)


def goes_by_data(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run makes a pass over its data before it trains, as `calibration` says: for columns or for a start."""
    by_columns = method == "paca" and settings.get("selection") in FROM_BATCHES
    return by_columns or settings.get("init_lora_weights") in FROM_DATA


def _peft_type(settings: Mapping[str, Any], origins: Origins) -> str:
    known = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    place, given = origins.of("peft.peft_type"), settings.get("peft_type")
    if given is None:
        raise PacaError(f"{place}: peft.peft_type is missing; it names the method, such as IA3 or LOHA.")
    kind = str(given).upper()
    if kind in ("PACA", "LORA"):
        raise PacaError(f"{place}: peft.peft_type: {given} has a section of its own, {kind.lower()}. Use that one.")
    if kind not in known:
        hint = did_you_mean(kind, known, "{}") or f" It knows {', '.join(known)}."
        raise PacaError(f"{place}: peft.peft_type must be a method of the installed PEFT, not {shown(given)}.{hint}")
    if kind in NOT_HERE:
        raise PacaError(f"{place}: peft.peft_type: {kind} can't be trained here: {NOT_HERE[kind]}.")
    if kind == "CPT" and not settings.get("cpt_token_ids"):
        raise PacaError(f"{place}: peft.cpt_token_ids is missing: the tokens of the examples that CPT begins with.")
    if kind == "ADAMSS" and find_spec("sklearn") is None:
        raise PacaError(f"{place}: peft.peft_type: ADAMSS needs scikit-learn. {how_to_install(None, 'scikit-learn')}")
    return kind


def adapter_config(method: str, settings: Mapping[str, Any], task_type: str | None = "CAUSAL_LM") -> PeftConfig | None:
    """The config of an adapter with the given settings, for a task by PEFT's names; None where there is none."""
    if method == "full":
        return None
    # A copy: PEFT adds to its lists.
    given = {name: copy.deepcopy(value) for name, value in settings.items() if name != "peft_type"}
    if given.get("total_step", 0) is None or (settings.get("peft_type") == "ADALORA" and "total_step" not in given):
        given["total_step"] = _STEPS_OF_THE_RUN
    start = given.get("init_lora_weights")
    if start in FROM_DATA:  # PEFT warns of one that is missing, or fails later
        given[f"{start}_config"] = given.get(f"{start}_config") or {}
    if given.get("loftq_config"):  # of which PEFT looks for every key
        given["loftq_config"] = vars(LoftQConfig(**given["loftq_config"]))
    return config_type(method, settings)(task_type=task_type, **given)


def outline_config(method: str, settings: Mapping[str, Any], task_type: str | None = "CAUSAL_LM") -> PeftConfig | None:
    """The same for a model without weights: nothing can be chosen or computed from them."""
    if method == "paca":
        settings = {**settings, "selection": "random", "random_seed": 0, "original_weights": None}
    elif "init_lora_weights" in settings:
        settings = {**settings, "init_lora_weights": True}
        settings = {name: value for name, value in settings.items() if name not in _OF_STARTS}
    config = adapter_config(method, settings, task_type)
    if isinstance(config, ShiraConfig):
        config.mask_fn = None  # it has as many weights, without their places
    return config


def with_defaults(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every default spelled out that YAML can hold, for the resolved config."""
    config = adapter_config(method, settings)
    fields = adapter_fields(method, settings)
    values = {name: plain(settings[name] if name == "peft_type" else getattr(config, name)) for name in fields}
    return {
        name: value
        for name, value in values.items()
        if name in settings
        or (matches(value, fields[name]) and not dataclasses.is_dataclass(getattr(config, name, None)))
        if value != _STEPS_OF_THE_RUN
    }


def method_name(method: str, settings: Mapping[str, Any]) -> str:
    """For summaries: `paca`, `lora`, `full`, or the `peft_type` in lower case, such as `ia3`."""
    return str(settings["peft_type"]).lower() if method == "peft" else method


def plain(value: Any) -> Any:
    """A value as YAML can hold it: sets and tuples become lists, members of enums their values."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {option.name: getattr(value, option.name) for option in dataclasses.fields(value) if option.init}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value

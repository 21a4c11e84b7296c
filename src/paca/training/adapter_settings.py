"""The ``paca`` section of a run: the fields of :class:`paca.PacaConfig` that a user sets."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.training.key_checks import Origins, check_section

if TYPE_CHECKING:
    from collections.abc import Mapping


def adapter_fields() -> dict[str, Any]:
    """Name and type of each field of ``PacaConfig`` that is not bookkeeping."""
    bookkeeping = {option.name for option in dataclasses.fields(PeftConfig)} | {"base_quantization"}
    annotations = typing.get_type_hints(PacaConfig)
    return {
        option.name: annotations[option.name]
        for option in dataclasses.fields(PacaConfig)
        if option.init and option.name not in bookkeeping
    }


def check_adapter_settings(settings: Mapping[str, Any], origins: Origins) -> None:
    """Check the keys, types and values of the section.

    Raises:
        PacaError: An unknown key, a wrong type, or a value that ``PacaConfig`` refuses.
    """
    check_section("paca", settings, adapter_fields(), origins)
    try:
        adapter_config(settings)
    except (ValueError, TypeError) as error:
        named = re.match(r"\w*", str(error))
        if named is not None and named[0] in settings:
            raise PacaError(f"{origins.of(f'paca.{named[0]}')}: paca.{error}") from error
        raise PacaError(f"{origins.path}, section paca: {error}") from error


def adapter_config(settings: Mapping[str, Any]) -> PacaConfig:
    """The ``PacaConfig`` of a causal language model with the given settings."""
    return PacaConfig(task_type="CAUSAL_LM", **settings)


def outline_config(settings: Mapping[str, Any]) -> PacaConfig:
    """The same for a model without weights: it has no columns to choose among, only their number."""
    return adapter_config({**settings, "selection": "random", "random_seed": 0, "original_weights": None})


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every default spelled out, as plain values for the resolved config."""
    config = adapter_config(settings)
    return {name: plain(getattr(config, name)) for name in adapter_fields()}


def plain(value: Any) -> Any:
    """A value as YAML can hold it: sets and tuples become lists."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value

"""A plugin of pytest: tests that are parametrized with LoRA's config get PaCA's, and all others are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet
from peft import LoraConfig

import paca
from pefts_tests.differences import difference

_DROPPED = {"lora_dropout", "lora_bias", "use_rslora", "fan_in_fan_out"}
"""What PaCA has not, and without which the tests are as good."""
_RENAMED = {"lora_alpha": "paca_alpha", "init_lora_weights": "init_weights"}
_KNOWN = {option.name for option in dataclasses.fields(paca.PacaConfig)}
_RANKS = {"conv1d": 1, "l2": 1, "lin1": 9}
"""Of PEFT's layers of fewer columns than `PacaConfig.r`, and of one with many that are always zero."""


@dataclasses.dataclass
class PacaConfig(paca.PacaConfig):
    """PaCA's default is more than the layers of these tests have."""

    r: int = 4


def as_paca(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of LoRA as PaCA's, or None where they ask for a kind of LoRA that PaCA has no match for."""
    if settings.get("bias", "none") != "none" or settings.get("init_lora_weights", True) not in (True, False):
        return None
    kept = {_RENAMED.get(name, name): value for name, value in settings.items() if name not in {*_DROPPED, "bias"}}
    if not kept.keys() <= _KNOWN:
        return None
    return {"rank_pattern": _RANKS, **kept, "r": min(kept.get("r", PacaConfig.r), PacaConfig.r)}


def _settings_of(config: LoraConfig) -> dict[str, Any]:
    default = LoraConfig()
    own = {option.name: getattr(config, option.name) for option in dataclasses.fields(config) if option.init}
    return {name: value for name, value in own.items() if value != getattr(default, name)}


def _cell(value: Any, kind: type[paca.PacaConfig]) -> Any:
    """One value of a row; None where there is no match."""
    if value is LoraConfig:
        return kind
    if type(value) is LoraConfig:
        made = as_paca(_settings_of(value))
        return None if made is None else PacaConfig(**made)
    return value


def _rows(rows: Iterable[Any], several: bool, kind: type[paca.PacaConfig]) -> list[Any]:
    found = []
    for row in rows:
        cells = list(row.values if isinstance(row, ParameterSet) else row if several else [row])
        if not any(cell is LoraConfig or type(cell) is LoraConfig for cell in cells):
            continue
        cells = [_cell(cell, kind) for cell in cells]
        cells = [as_paca(cell) if isinstance(cell, dict) else cell for cell in cells]
        for settings in cells if any("Groups" in str(cell) for cell in cells) else ():
            if isinstance(settings, dict):
                settings["r"] = 1  # a group has one
        if None not in [cell if cell is None else 0 for cell in cells]:
            found.append(tuple(cells) if several else cells[0])
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    kind = paca.PacaConfig if metafunc.module.__name__.endswith("test_config") else PacaConfig  # it saves and loads it
    for number, mark in enumerate(marks):
        if mark.name == "parametrize":
            names: str | Sequence[str] = mark.args[0]
            several = "," in names if isinstance(names, str) else len(names) > 1
            if found := _rows(mark.args[1], several, kind):
                marks[number] = pytest.mark.parametrize(names, found).mark


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item for item in items if hasattr(item, "callspec") and any(map(_is_ours, item.callspec.params.values()))
    ]
    for item in items:
        if why := difference(item.nodeid):
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))


def _is_ours(value: Any) -> bool:
    return value in (PacaConfig, paca.PacaConfig) or isinstance(value, paca.PacaConfig)

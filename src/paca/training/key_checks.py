"""Keys and values of a config, checked: messages name the place, what was expected and the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.training.typed_values import choices, expected, matches, shown


class Origins:
    """Where each key was given, for messages: a file and line, or ``--set``."""

    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path = path
        self.lines = dict(lines)
        self.overridden: set[str] = set()

    def of(self, key: str) -> str:
        """``"runs/a.yaml, line 7"`` or ``"--set"``, for a dotted key such as ``train.optim``."""
        if key in self.overridden:
            return "--set"
        line = self.lines.get(key) or self.lines.get(key.partition(".")[0])
        return f"{self.path}, line {line}" if line else str(self.path)


def check_keys(section: str, given: Iterable[str], valid: Iterable[str], origins: Origins) -> None:
    """Refuse keys that a section does not have.

    Raises:
        PacaError: Names the key, its place and the nearest valid name.
    """
    names = sorted(valid)
    for key in given:
        if key in names:
            continue
        hint = did_you_mean(key, names, f"{section}.{{}}")
        if len(names) <= 20:
            hint += f" The keys of {section} are {', '.join(names)}."
        raise PacaError(f"{origins.of(f'{section}.{key}')}: there is no key {section}.{key}.{hint}")


def check_type(key: str, value: Any, annotation: Any, origins: Origins) -> None:
    """Refuse a value of the wrong type.

    Raises:
        PacaError: Names the dotted key, its place, what was expected and what was found.
    """
    if not matches(value, annotation):
        hint = did_you_mean(value, choices(annotation), "{}") if isinstance(value, str) else ""
        raise PacaError(f"{origins.of(key)}: {key} must be {expected(annotation)}, not {shown(value)}.{hint}")


def check_choice(key: str, value: Any, allowed: Iterable[Any] | None, origins: Origins) -> None:
    """Refuse a value that is not among those that its field lists; `allowed` is None or empty where it lists none.

    Raises:
        PacaError: Names the dotted key, its place and the choices.
    """
    if allowed and value is not None and value not in allowed:
        raise PacaError(f"{origins.of(key)}: {key} must be one of {', '.join(map(str, allowed))}, not {shown(value)}.")

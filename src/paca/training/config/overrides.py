"""`--set SECTION.KEY=VALUE`: settings that are changed on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import ALL, METHODS
from paca.training.config.strict_yaml import parse_value
from paca.training.config.typed_values import shown

FIRST = {"model": "name", "data": "train", "output": "dir"}
"""The key that is meant where a section is given as one value."""


def apply_overrides(
    sections: dict[str, dict[str, Any]],
    overrides: Iterable[str],
    origins: Origins,
    keys_of_all: Callable[[], Iterable[tuple[str, Iterable[str]]]],
) -> None:
    """Change the sections of a YAML.

    Args:
        sections: They are changed.
        overrides: As for `load_run_config`.
        origins: Where each key was given; learns of these.
        keys_of_all: Finds the sections and the keys of each, for one that is given without its section.

    Raises:
        PacaError: One is not of the form, or names a section that is none, or an entry of a key that has none, or its
            value is no YAML.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if section in METHODS and separator and not dot and text.strip() == "null":
            sections.pop(section, None)
            continue
        if section in ALL and separator and not dot and isinstance(whole := parse_value(text), dict):  # full={}
            sections[section] = whole
            origins.overridden |= {section, *(f"{section}.{name}" for name in whole)}
            continue
        if not separator or not dot or not name or name.endswith("."):
            example = _example(key.strip(), text, keys_of_all) if separator else "train.learning_rate=1e-4"
            raise PacaError(f"--set {override}: expected section.key=value, such as --set {example}.")
        if section not in ALL:
            raise PacaError(f"--set {override}: there is no section {section!r}.{section_hint(section, list(ALL))}")
        try:
            value = parse_value(text)
        except PacaError as error:
            raise PacaError(f"--set {override}: {error}") from error
        name, _, entry = name.partition(".")  # an entry's name, such as one of rank_pattern, may hold dots
        values = sections.setdefault(section, {})
        if entry:
            before = {} if values.get(name) is None else values[name]
            if not isinstance(before, dict):
                raise PacaError(
                    f"--set {override}: {section}.{name} is {shown(before)}, which has no entries. Set it as a whole: "
                    f"--set '{section}.{name}={{{entry}: {text}}}'"
                )
            value = {**before, entry: value}
        values[name] = value
        origins.overridden.add(f"{section}.{name}")


def _example(key: str, text: str, keys_of_all: Callable[[], Iterable[tuple[str, Iterable[str]]]]) -> str:
    """What was meant, if a section has such a key or is one; otherwise one that is right."""
    if key in FIRST:
        return f"{key}.{FIRST[key]}={text}"
    owner = next((name for name, keys in keys_of_all() if key in keys), None)
    return f"{owner}.{key}={text}" if owner else "train.learning_rate=1e-4"


def section_hint(name: str, names: list[str]) -> str:
    """What to say of a section that there is not."""
    return did_you_mean(name, names, "{}") or f" The sections are {', '.join(names)}."

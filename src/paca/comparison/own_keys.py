"""Settings of a run that a comparison gives each of its runs itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paca.messages.errors import PacaError
from paca.training.config.strict_yaml import parse_value

Sections = Mapping[str, Mapping[str, Any]]

SEEDS = {"train.seed": "--seeds gives each run its own", "paca.random_seed": "PaCA's columns follow the run's --seeds"}
OWN = {
    **SEEDS,
    "eval.after": "methods are compared by what is measured after training",
    "train.early_stopping_patience": "each run of a comparison makes all its steps",
}
"""Of each, why it has no effect."""
_FOLDER = "each run has its own folder in --output"


def without_own(sections: Sections) -> dict[str, dict[str, Any]]:
    """The same sections without these settings."""
    return {
        name: {key: value for key, value in values.items() if f"{name}.{key}" not in OWN}
        for name, values in sections.items()
    }


def notes_on_own(sections: Sections) -> list[str]:
    """A sentence on each of them that a YAML has, as one made for `paca train` may, and that has no effect.

    Args:
        sections: Of the whole run, defaults included.
    """
    given = {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    if given.get("eval.after") is True:  # the default
        del given["eval.after"]
    return [
        f"{key}: {_shown(given[key])} of the YAML has no effect: {why}." for key, why in OWN.items() if key in given
    ]


def refuse_own(overrides: Iterable[str]) -> None:
    """Refuse them where they are given by hand, for this comparison.

    Args:
        overrides: `"section.key=value"` each, of which each is right by itself.

    Raises:
        PacaError: One is of these, or of where a run's results go.
    """
    for override in overrides:
        name, _, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        values = {key: parse_value(text)} if dot else parse_value(text) or {}  # train={seed: 7}; full=null
        for key, value in values.items():
            why = _FOLDER if section == "output" else OWN.get(f"{section}.{key}")
            if why is not None and (section, key, value) != ("eval", "after", True):
                instead = f", and give --seeds {value}" if f"{section}.{key}" in SEEDS and value is not None else ""
                raise PacaError(f"--set {section}.{key} would change nothing: {why}. Leave it out{instead}.")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

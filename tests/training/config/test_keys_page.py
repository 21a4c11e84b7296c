"""The table of a run's keys in docs/guides/training.md: each is there, with the default that it has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from paca.training.config.run_config import SECTIONS

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "training.md"


def table() -> dict[str, str]:
    """By key of a section, its default in words."""
    text = PAGE.read_text(encoding="utf-8").partition("## Keys")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for keys, default in re.findall(r"^\| (`.*?`) \| (.*?) \|", text, re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", keys)
        section = names[0].partition(".")[0]
        defaults = default.split(", ")
        for number, name in enumerate(names):
            whole = name if "." in name else f"{section}.{name}"
            found[whole] = defaults[number if len(defaults) > 1 else 0]
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_there_with_its_default(section: str) -> None:
    found = table()
    fields = {f"{section}.{field.name}": field.default for field in dataclasses.fields(SECTIONS[section])}
    assert {key for key in found if key.startswith(f"{section}.")} == set(fields)
    for key, default in fields.items():
        if default is dataclasses.MISSING:
            assert found[key] in ("–", "`runs/` and the YAML's name"), key
        else:
            said = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
            assert found[key].strip("`") == said, key

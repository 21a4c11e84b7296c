"""Reference pages of the documentation site, made from the code: commands, and the settings of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
import typer

from paca.cli import app
from paca.training.config.run_config import METHODS, SECTIONS

SOURCES = Path(__file__).parents[2] / "src"
CONFIGS = {"paca": "paca.config.PacaConfig"}
OTHERS = {
    "lora": "The fields of `peft.LoraConfig`.",
    "peft": "`peft_type`, the name of a method of PEFT such as `IA3`, and the fields of its config.",
    "full": "Nothing: every weight is trained.",
}
TRAIN = """## train

`trainer` (`sft`, `dpo`, `grpo`, `reward`, `classification` or `image_classification`), and the fields of that trainer's
own settings: TRL's `SFTConfig`, `DPOConfig`, `GRPOConfig` and `RewardConfig`, or transformers' `TrainingArguments`.
Which defaults differ is in [the guide](../guides/training.md), and the keys of ours are in [the guide to
trainers](../guides/trainers.md).
"""


def commands_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    return "# Commands\n\n" + "\n".join(_command(f"paca {name}", one) for name, one in group.commands.items())


def _command(name: str, command: Any) -> str:  # click's, or the copy of it that newer versions of typer have
    inner = [_command(f"{name} {of}", one) for of, one in getattr(command, "commands", {}).items()]
    context = command.context_class(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [row for parameter in command.params if (row := parameter.get_help_record(context)) is not None]
    table = [f"| {_cell(f'`{flag}`')} | {_cell(text)} |" for flag, text in rows if not flag.startswith("--help")]
    head = ["", "| | |", "|---|---|"] if table else []
    page = [f"## {name}", "", (command.help or "").strip(), "", f"    {name} {usage}", *head, *table, ""]
    return "\n".join([*page, *inner])


def settings_page() -> str:
    """Every key of a run's YAML that is ours."""
    package = griffe.load("paca", search_paths=[SOURCES], resolve_aliases=False)
    parts = ["# Settings\n\nA run is a YAML file of these sections. [How to write one](../guides/training.md).\n"]
    names = [*list(SECTIONS)[:2], *METHODS, *list(SECTIONS)[2:]]
    for name in names:
        if name in OTHERS:
            parts.append(f"## {name}\n\n{OTHERS[name]}\n")
        else:
            path = CONFIGS.get(name) or f"paca.training.config.run_config.{SECTIONS[name].__name__}"
            parts.append(_section(name, package[path.removeprefix("paca.")]))
        if name == "calibration":
            parts.append(TRAIN)
    return "\n".join(parts)


def _section(name: str, config: griffe.Class) -> str:
    lines = [f"## {name}", "", "| key | type | default | |", "|---|---|---|---|"]
    for key, attribute in config.attributes.items():
        # What follows `__post_init__` sets is no field.
        if attribute.annotation is None or attribute.docstring is None:
            continue
        default = "" if attribute.value is None else str(attribute.value)
        default = {"field(default_factory=dict)": "{}"}.get(default, default)
        kind = str(attribute.annotation).replace(" | ", " or ").replace("None", "null")
        cells = [f"`{key}`", f"`{kind}`", f"`{default}`" if default else "needed"]
        lines.append("| " + " | ".join(_cell(cell) for cell in [*cells, attribute.docstring.value]) + " |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """The text for a cell: Python-Markdown shows a `|` in code as it is, and would show a backslash too."""
    return " ".join(re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", text).split())

"""Write the memory of each recipe into its header, and the table of all of them into `recipes/README.md`.

Run it as `python tools/plan_recipes.py` when a recipe comes, goes or changes, or when plans do; with names of files it
plans only these anew. A recipe's header holds the `paca plan` command that is carried out here, with the name of a
published shape in place of the model's, so that no hub is needed. `tests/recipes` compares what is written.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
PAGE = RECIPES / "README.md"
BEGIN, END = "<!-- recipes:begin -->", "<!-- recipes:end -->"
LISTED = 3
"""How many parts of a plan are listed, the largest first; the others are summed up."""

_PLAN = re.compile(r"^# Memory: (?P<memory>.*)\n#   paca plan (?P<arguments>.*)\n", re.M)


@dataclass(frozen=True)
class Recipe:
    """A file of `recipes/`."""

    path: Path

    @cached_property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def content(self) -> dict[str, Any]:
        """Its sections."""
        return yaml.safe_load(self.text)

    @property
    def name(self) -> str:
        """Its path from the root of the repository, as commands give it."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def title(self) -> str:
        """The first line: what it is."""
        return self.text.partition("\n")[0].removeprefix("#").strip()

    @property
    def plan(self) -> re.Match[str] | None:
        """The lines of its header with the memory, and the command for it."""
        return _PLAN.search(self.text)

    @property
    def shape(self) -> str:
        """The published shape that the plan is made for."""
        assert self.plan is not None
        target, *rest = self.plan["arguments"].split()
        return next((word.removeprefix("model.name=") for word in rest if word.startswith("model.name=")), target)

    def row(self) -> str:
        """Its row of the table."""
        sections, folder = self.content, self.path.relative_to(RECIPES)
        method = next((name for name in ("lora", "peft", "full") if name in sections), "paca")
        if sections["model"].get("quantization") is not None:
            method += f", {sections['model']['quantization']}"
        r = sections.get(method.partition(",")[0], {}).get("r", "")
        if "trainer" in sections["train"]:
            method += f", {sections['train']['trainer']}"
        memory = self.plan["memory"].partition(" GiB")[0] + " GiB" if self.plan else ""
        data = re.split(r"[:\[]", sections["data"]["train"])[0]  # without configuration and split
        return (
            f"| [{folder.as_posix().removesuffix('.yaml')}]({folder.as_posix()}) | {data} | {method} | {r} | {memory} |"
        )


def recipes() -> list[Recipe]:
    """All recipes, the paper's first."""
    order = ("demo.yaml", "paper", "peft", "24gb", "80gb")
    paths = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "launch")  # of accelerate's launcher
    found = [Recipe(path) for path in paths]
    return sorted(found, key=lambda recipe: order.index(recipe.path.relative_to(RECIPES).parts[0]))


def planned_memory(recipe: Recipe) -> str:
    """What `paca plan` foretells, in words.

    Args:
        recipe: One whose header has the command.
    """
    from paca.cli import app

    assert recipe.plan is not None
    # A rate is given so that a device that is here is not measured.
    printed = CliRunner().invoke(app, ["plan", *recipe.plan["arguments"].split(), "--json", "--rate", "1"])
    if printed.exception is not None:
        raise printed.exception
    planned = json.loads(printed.stdout)
    parts: Counter[str] = Counter()
    for name, size in planned["memory"].items():
        parts[name.partition(":")[0]] += size
    largest = dict(parts.most_common(LISTED))
    total = planned["total"]
    largest["the rest"] = total - sum(largest.values())
    listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest.items())
    return f"{total / 2**30:.1f} GiB on a GPU: {listed}"


def with_memory(recipe: Recipe, memory: str) -> str:
    """The recipe's text with that memory in its header."""
    assert recipe.plan is not None
    start, end = recipe.plan.span("memory")
    return recipe.text[:start] + memory + recipe.text[end:]


def table() -> str:
    """The table of all recipes."""
    head = "| recipe | data | method | r | memory |\n|---|---|---|---:|---:|\n"
    return head + "\n".join(recipe.row() for recipe in recipes()) + "\n"


def page_with(table: str) -> str:
    """The page with that table in place of the one it has."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}"


def main(names: Iterable[str]) -> None:
    """Plan the recipes of these paths, or all, and write the table."""
    wanted = {Path(name).resolve() for name in names}
    for recipe in recipes():
        if recipe.plan is not None and (not wanted or recipe.path in wanted):
            memory = planned_memory(recipe)
            print(f"{recipe.name}: {memory}", flush=True)
            recipe.path.write_text(with_memory(recipe, memory), encoding="utf-8")
    PAGE.write_text(page_with(table()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

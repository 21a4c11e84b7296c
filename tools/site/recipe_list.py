"""The page of recipes of the documentation site, made from the headers of `recipes/*.yaml`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tools.plan_recipes import Recipe, recipes  # noqa: E402

FOLDERS = {
    "": "The demo",
    "paper": "The paper's experiments",
    "peft": "The setting of PEFT's method comparison",
    "24gb": "For one card of 24 GB",
    "80gb": "For one card of 80 GB",
}
HEAD = """# Recipes

Each recipe is a complete run: `paca train recipes/24gb/qwen3-8b-sft.yaml`. Add `--dry-run` to look at it first, and
`--set SECTION.KEY=VALUE` to change any key.

None of those for GPUs was trained in full here: there is no such GPU. So they have no results yet. A test trains each
for two steps, with a tiny model of the same architecture. *Memory* is what `paca plan` foretells for a GPU. It was not
compared with a card.

Runs with results here: [ARC](../benchmarks/quality/arc.yaml), [GSM8K](../benchmarks/quality/gsm8k.yaml), [an
encyclopedia](../benchmarks/quality/encyclopedia.yaml), [digits](../benchmarks/quality/digits.yaml), each with PaCA and
LoRA. [What came out](notes/quality.md).
"""
_ENTRY = re.compile(r"# (?P<name>[A-Z][A-Za-z]+(?:, nearly)?): (?P<text>.*(?:\n#   .*)*)")


def recipes_page() -> str:
    """Every recipe with what its header says, by folder."""
    parts, folder = [HEAD], None
    for recipe in recipes():
        inner = recipe.path.parent.name if recipe.path.parent.name in FOLDERS else ""
        if inner != folder:
            parts.append(f"## {FOLDERS[inner]}\n")
            folder = inner
        parts.append(_entry(recipe))
    return "\n".join(parts)


def _entry(recipe: Recipe) -> str:
    header = recipe.text.partition("\nmodel:")[0]
    parts = [f"### {recipe.path.stem}", f"[{recipe.name}](../{recipe.name}): {recipe.title}"]
    for found in _ENTRY.finditer(header):
        said, commands = _parted(found["text"])
        parts.append(f"*{found['name']}*: {said}")
        if commands:
            parts.append("\n".join(["```sh", *commands, "```"]))
    return "\n\n".join([*parts, ""])


def _parted(text: str) -> tuple[str, list[str]]:
    """What an entry says in words, and the lines of its command."""
    said: list[str] = []
    commands: list[str] = []
    for line in text.replace("\n#   ", "\n").split("\n"):
        is_command = line.startswith("paca ") or (commands and commands[-1].endswith("\\"))
        (commands if is_command else said).append(line)
    return " ".join(said), commands

"""The code of pages for people: finds its blocks, and says what each is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *ROOT.glob("docs/**/*.md")]
_SKIPPED = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    """Path from the root of the repository."""
    line: int
    language: str
    """Empty for an indented block."""
    text: str
    skipped: str | None
    """Why it is not run, where a comment right above it says that it isn't."""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    """All blocks of all pages."""
    return [block for page in sorted(PAGES) for block in blocks_of(page)]


def blocks_of(page: Path) -> Iterator[Block]:
    above = None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(str(page.relative_to(ROOT)), token.map[0] + 1, token.info.strip(), token.content, above)
        if token.type == "html_block":
            found = _SKIPPED.search(token.content)
            above = found[1] if found else None
        else:
            above = None


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block, each as its words; comments and settings of the environment are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    for words in commands:
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
    return [words for words in commands if words]


def quoted_commands(page: Path) -> Iterator[list[str]]:
    """What a page says within a line and that begins with `paca`; it need not be whole."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and re.match(r"paca( |$)", child.content):
                yield shlex.split(child.content)

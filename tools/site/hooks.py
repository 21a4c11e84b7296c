"""Hooks of mkdocs: the README is the home page, and files beside `docs/` that a page links to come with the site."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
BESIDE = "repository"
"""The folder of the site that holds such files."""
_LINK = re.compile(r"(\]\(\s*)([^)\s#]+)(#[^)\s]*)?(\s*\))")
_TEXT = {".csv", ".sh", ".py", ".yaml", ".jsonl", ".toml"}

sys.path.insert(0, str(Path(__file__).parent))
from reference import commands_page, settings_page  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the home page, the reference, and what pages link to beside `docs/`."""
    made = {"index.md": _home(), "reference/commands.md": commands_page(), "reference/settings.md": settings_page()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    waiting = [ROOT / "README.md", *(ROOT / "docs" / file.src_uri for file in files.documentation_pages())]
    seen: set[Path] = set()
    while waiting:
        page = waiting.pop()
        if not page.is_file():
            continue
        for _, link, _, _ in _LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if ":" in link or target in seen or not _is_beside(target):
                continue
            seen.add(target)
            if target.is_dir():
                continue
            name = f"{BESIDE}/{target.relative_to(ROOT)}"
            if target.suffix == ".md":
                waiting.append(target)
                files.append(File.generated(config, name, content=_rewritten(target)))
            else:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links that leave `docs/` to the copies."""
    if page.file.generated_by is not None:
        return markdown
    return _with_links(markdown, ROOT / "docs" / page.file.src_uri, page.file.src_uri)


def _home() -> str:
    return _with_links((ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "README.md", "index.md")


def _rewritten(file: Path) -> str:
    return _with_links(file.read_text(encoding="utf-8"), file, f"{BESIDE}/{file.relative_to(ROOT)}")


def _with_links(markdown: str, file: Path, name: str) -> str:
    """The text of `file`, to stand at `name` in the site."""

    def lead(found: re.Match[str]) -> str:
        before, link, part, after = found.groups()
        if ":" in link:
            return found[0]
        target = (file.parent / link).resolve()
        if target.is_relative_to(ROOT / "docs"):
            place = str(target.relative_to(ROOT / "docs"))
        elif _is_beside(target) and target.is_file():
            place = f"{BESIDE}/{target.relative_to(ROOT)}"
        else:
            return found[0]
        return f"{before}{os.path.relpath(place, os.path.dirname(name) or '.')}{part or ''}{after}"

    return _LINK.sub(lead, markdown)


def _is_beside(target: Path) -> bool:
    return target.exists() and target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs")

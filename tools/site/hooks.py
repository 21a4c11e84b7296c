"""Hooks of mkdocs: the README is the home page, some pages are made from code, recipes and notebooks, and files beside
`docs/` that a page links to come with the site."""

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
from notebooks import notebook_page  # noqa: E402
from recipe_list import recipes_page  # noqa: E402

from reference import commands_page, settings_page  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the home page, the reference, and what pages link to beside `docs/`."""
    made = {
        "reference/commands.md": commands_page(),
        "reference/settings.md": settings_page(),
        "recipes.md": recipes_page(),
        **{f"notebooks/{file.stem}.md": notebook_page(file) for file in (ROOT / "docs" / "notebooks").glob("*.ipynb")},
    }
    pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    waiting = [(ROOT / "docs" / name, text) for name, text in made.items()]
    waiting += [(page, page.read_text(encoding="utf-8")) for page in (ROOT / "README.md", *pages)]
    for page, text in waiting[: len(made)]:
        name = str(page.relative_to(ROOT / "docs"))
        files.append(File.generated(config, name, content=_with_links(text, page, name)))
    files.append(File.generated(config, "index.md", content=_home()))
    seen: set[Path] = set()
    while waiting:
        page, text = waiting.pop()
        for _, link, _, _ in _LINK.findall(text):
            target = (page.parent / link).resolve()
            if ":" in link or target in seen or not _is_beside(target):
                continue
            seen.add(target)
            if target.is_dir():
                continue
            name = f"{BESIDE}/{target.relative_to(ROOT)}"
            if target.suffix == ".md":
                waiting.append((target, target.read_text(encoding="utf-8")))
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

"""The documentation site is built from `docs/` and the code, without network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forked_process import run_forked

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"
pytestmark = pytest.mark.slow(reason="builds the whole site")
MKDOCS = "from mkdocs.__main__ import cli\ncli()"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "NO_MKDOCS_2_WARNING": "1"}.items():
            environment.setenv(name, value)
        # Strict: a link that leads nowhere is an error. Not --quiet: then mkdocs counts no warnings, and all is well.
        done = run_forked(MKDOCS, "build", "--strict", "--site-dir", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_needs_nothing_from_elsewhere(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?://(?!squidfunk)", text), page


def test_commands_and_settings_are_those_of_the_code(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for word in ("paca train", "paca bench report", "--baseline", "--dry-run", "--equal", "RUN.yaml"):
        assert word in commands
    assert "RUN.yaml|RUN_FOLDER" in commands
    assert "\\|" not in commands + (site / "reference" / "settings.html").read_text(encoding="utf-8")
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for word in ("paca_alpha", "rotate_every", "heldout_seed", "answer_pattern", "trust_remote_code"):
        assert f"<code>{word}</code>" in settings
    assert "Settings of a PaCA adapter" in (site / "reference" / "python.html").read_text(encoding="utf-8")


def test_what_pages_link_to_beside_docs_comes_along(site: Path) -> None:
    assert (site / "repository" / "benchmarks" / "cpu-core.csv").is_file()
    home = (site / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#:]+)"', home)
    assert len(links) > 30
    assert not [link for link in links if not (site / link).exists()]


def test_lists_are_lists(site: Path) -> None:
    """Where a list follows a line of text at once, GitHub sees a list, and the site does not."""
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"^(-|\d+\.) .*", text, re.M), page


def test_recipes_and_notebooks_are_pages(site: Path) -> None:
    recipes = (site / "recipes.html").read_text(encoding="utf-8")
    runs = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "launch"]
    assert recipes.count("<em>Source</em>") == len(runs)
    assert 'href="repository/benchmarks/quality/arc.yaml"' in recipes
    assert 'href="notes/quality.html"' in recipes
    assert "the same answers as before: True" in (site / "notebooks" / "first-run.html").read_text(encoding="utf-8")

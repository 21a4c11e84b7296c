"""Docstrings have one style: single backticks, and a capital after each name of `Args:` and `Raises:`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"


def docstrings() -> Iterator[tuple[str, str]]:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", text


def small_entries(text: str) -> list[str]:
    """The entries of `Args:` and `Raises:` that begin with a small letter."""
    found = []
    for section in re.finditer(r"^( *)(?:Args|Raises):\n((?:\1 +.*\n)*)", text + "\n", re.M):
        found += re.findall(rf"^{section[1]}    [\w*]+: [a-z].*", section[2], re.M)
    return found


def loose_lines(text: str) -> list[str]:
    """Lines that go on from the one above without an indent: the site shows an entry of its own for each."""
    found = []
    for section in re.finditer(r"^( *)(Args|Raises|Returns|Yields):\n((?:\1 +.*\n)*)", text + "\n", re.M):
        entries = re.findall(rf"^{section[1]}    (\S.*)", section[3], re.M)
        named = section[2] in ("Args", "Raises")
        found += [entry for entry in entries if not re.match(r"[\w*., ]+: ", entry)] if named else entries[1:]
    return found


def test_a_small_letter_is_found() -> None:
    text = "Do.\n\n    Args:\n        one: Which.\n            or: none.\n        two: which.\n    "
    assert small_entries(text) == ["        two: which."]


def test_a_line_that_goes_on_without_an_indent_is_found() -> None:
    text = "\n    Args:\n        one: Which\n        of them.\n\n    Returns:\n        What\n        is left.\n"
    assert loose_lines(text) == ["of them.", "is left."]


def test_docstrings_have_one_style() -> None:
    texts = list(docstrings())
    assert len(texts) > 1000
    assert not [place for place, text in texts if "``" in text]
    assert not [(place, found) for place, text in texts if (found := small_entries(text))]
    assert not [(place, found) for place, text in texts if (found := loose_lines(text))]

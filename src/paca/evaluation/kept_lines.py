"""Files of JSON lines that grow as results come, and are read again by the next run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def key_of(*parts: str) -> str:
    """A short name for what a line was made from."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to; a last line that was cut short is left out, and taken away."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.split("\n") if line]

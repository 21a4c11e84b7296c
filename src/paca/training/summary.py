"""summary.json: what was trained on what, what came out, what it cost, and what it ran on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)

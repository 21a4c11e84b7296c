"""Notebooks as pages of the documentation site: their text, their code, and what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def notebook_page(file: Path) -> str:
    """The Markdown of a notebook.

    Args:
        file: The `.ipynb`.
    """
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))  # to the other's page
        elif cell["cell_type"] == "code":
            parts += [f"```python\n{source}\n```", *(_printed(output) for output in cell["outputs"])]
    parts.append(f"This page is [a notebook]({file.name}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _printed(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        text = "".join(output["text"]) if output["name"] == "stdout" else ""
    else:
        text = "".join(output.get("data", {}).get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""

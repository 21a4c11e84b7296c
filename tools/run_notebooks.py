"""Run the notebooks of `docs/notebooks` as they stand, and keep what they print in them.

Run it as `make notebooks` when one changes. It needs the hub once, for the model (or a folder of it, below), and some
minutes. The tests run the same code with a tiny model.

    python tools/run_notebooks.py --model FOLDER    # where there is no network: a folder of SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CODE = "run_of"
"""The key of a notebook's metadata that says which code the outputs are of."""
HIDDEN = {"stderr"}
"""Streams that are not kept: progress and warnings of libraries."""


def code_of(cells: Iterable[Mapping[str, Any]]) -> str:
    """A hash of the code of a notebook's cells."""
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def run(file: Path, model: Path | None) -> None:
    """Run one notebook in a folder of its own, and write its outputs into it.

    Args:
        file: The `.ipynb`.
        model: A folder that stands for the model of the hub.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        if model is not None:
            place = Path(folder, NAME)
            place.parent.mkdir(parents=True)
            place.symlink_to(model.resolve())
        NotebookClient(
            notebook, timeout=3600, coalesce_streams=True, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") not in HIDDEN]
    notebook.metadata[CODE] = code_of(notebook.cells)
    nbformat.write(notebook, file)
    print(file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(FOLDER.glob("*.ipynb")))
    arguments = parser.parse_args()
    for notebook in arguments.notebooks:
        run(notebook, arguments.model)

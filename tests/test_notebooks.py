"""The notebooks run, with a tiny model in the place of the named one, and what they show is of a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tools.run_notebooks import CODE, code_of

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
ADVICE = "run: make notebooks"


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook: Path, named_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for cell in cells(notebook, "code"):
        exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
    printed = capsys.readouterr().out
    if notebook.stem == "first-run":
        assert "the same answers as before: True" in printed
        assert "as LoRA, the same answer: True" in printed
    else:
        kept = {name: size / names["saved"]["paca"] for name, size in names["saved"].items()}
        assert kept["lora"] > kept["lora, tuned"] > 1
        assert len(names["rounds"]) == 9


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_was_run_as_it_stands(notebook: Path) -> None:
    code = cells(notebook, "code")
    assert json.loads(notebook.read_text())["metadata"].get(CODE) == code_of(code), ADVICE
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], ADVICE
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"], ADVICE
    assert sum(bool(cell["outputs"]) for cell in code) > len(code) / 2, ADVICE


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_its_links_lead_somewhere(notebook: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(notebook, "markdown"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert all((notebook.parent / link).is_file() for link in links)


def test_there_are_two() -> None:
    assert [notebook.stem for notebook in NOTEBOOKS] == ["beside-lora", "first-run"]

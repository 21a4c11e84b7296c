"""All cells of the matrix, and the outcomes that are committed."""

from __future__ import annotations

import json
from pathlib import Path

from support_matrix.cell import Outcome
from support_matrix.layers import OFFLOADED, REFUSED_LAYERS, RESIDENT_LAYERS
from support_matrix.operations import OPERATIONS
from support_matrix.quantizations import QUANTIZATIONS, REFUSED_QUANTIZATIONS
from support_matrix.subject import Refused, Subject

OUTCOMES_FILE = Path(__file__).with_name("outcomes.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "support-matrix.md"
ADAPT = "adapt"
"""The one operation of a row that is refused."""

LAYERS: tuple[Subject, ...] = (*RESIDENT_LAYERS, *OFFLOADED)
SUBJECTS: dict[str, Subject] = {subject.key: subject for subject in (*LAYERS, *QUANTIZATIONS)}
REFUSED: dict[str, Refused] = {row.key: row for row in (*REFUSED_LAYERS, *REFUSED_QUANTIZATIONS)}

CELLS: tuple[tuple[str, str], ...] = (
    *((key, operation) for key in SUBJECTS for operation in OPERATIONS),
    *((key, ADAPT) for key in REFUSED),
)

Outcomes = dict[str, dict[str, str]]


def read_outcomes() -> Outcomes:
    """Those that are committed: row → column → outcome."""
    outcomes: Outcomes = json.loads(OUTCOMES_FILE.read_text(encoding="utf-8")) if OUTCOMES_FILE.exists() else {}
    return outcomes


def missing(key: str) -> str | None:
    """What the row needs that is not here."""
    row: Subject | Refused = SUBJECTS[key] if key in SUBJECTS else REFUSED[key]
    return row.missing()


def run(key: str, operation: str, folder: Path) -> Outcome:
    """Run one cell."""
    from support_matrix.cell import run_cell, run_refused

    return run_refused(REFUSED[key], folder) if operation == ADAPT else run_cell(SUBJECTS[key], operation, folder)

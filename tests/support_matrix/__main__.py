"""`make matrix`: run every cell, or those of `ROWS="..."`, then write the outcomes and the page."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (as the tests run)
from support_matrix.cell import ACCEPTABLE
from support_matrix.document import document
from support_matrix.table import CELLS, DOCUMENT, OUTCOMES_FILE, Outcomes, missing, read_outcomes, run


def main(rows: list[str]) -> int:
    """Run the cells of `rows` (all of them if none is named) and keep the committed outcomes of the others.

    Returns 1, and writes nothing, if a cell crashes, is wrong, or can't be run here and never was.
    """
    committed, outcomes = read_outcomes(), Outcomes()
    bad: list[str] = [f"there is no row {row!r}" for row in rows if row not in {key for key, _ in CELLS}]
    kept: set[str] = set()
    for key, operation in CELLS:
        before = committed.get(key, {}).get(operation)
        reason = missing(key)
        if reason or (rows and key not in rows):
            if before is not None:
                outcomes.setdefault(key, {})[operation] = before
            if reason and before is None:
                bad.append(f"{key}, {operation}: {reason}, and there is no earlier outcome to keep")
            elif reason:
                kept.add(f"{key}: {reason}; its outcomes stay as they are")
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(key, operation, Path(folder))
        if outcome.kind not in ACCEPTABLE:
            bad.append(f"{key}, {operation}: {outcome}")
        elif str(outcome) != before:
            print(f"{key}, {operation}: {before or 'new'} -> {outcome}")
        outcomes.setdefault(key, {})[operation] = str(outcome)
    for line in (*sorted(kept), *bad):
        print(line, file=sys.stderr)
    if bad:
        print(f"Nothing was written: {len(bad)} cells neither work nor are refused by paca.", file=sys.stderr)
        return 1
    OUTCOMES_FILE.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if all(operation in outcomes.get(key, {}) for key, operation in CELLS):
        DOCUMENT.write_text(document(outcomes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

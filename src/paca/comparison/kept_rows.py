"""The rows of a comparison as it was left: a finished run whose folder is gone counts by its row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from paca.comparison.rows import Row
from paca.messages.errors import PacaError

ROWS = "runs.jsonl"
"""The file of them, in the comparison's folder. `settings.json` beside it says what the runs were."""


class KeptRows:
    """What is in a `runs.jsonl` now."""

    def __init__(self, path: Path) -> None:
        """Args:
        path: The file; one that is not there has no rows.

        Raises:
            PacaError: A line is broken.
        """
        self._rows: dict[str, Row] = {}
        # No `splitlines`: what JSON keeps as it is, such as U+2028 in a path, ends a line for it.
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["train_info"]["status"], row["run_info"]["config"]
                self._rows[row["name"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise PacaError(
                    f"{path}, line {number} is no row of a run ({type(error).__name__}: {error}). Mend it or delete "
                    "it; a run whose row and folder are both gone is trained anew."
                ) from error

    def others(self, rows: Iterable[Row]) -> list[Row]:
        """Those of other runs than these rows are of."""
        names = {row["name"] for row in rows}
        return [row for name, row in self._rows.items() if name not in names]

    def row(self, name: str) -> Row | None:
        """The row of a run that ended; None for one that failed, too."""
        row = self._rows.get(name)
        return row if row is not None and row["train_info"]["status"] == "success" else None

"""The rows of a comparison as it was left: a finished run whose folder is gone counts by its row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paca.comparison.rows import Row
from paca.messages.errors import PacaError
from paca.training.folder.same_run import FREE_TO_CHANGE

_OTHERWISE_FREE = {"eval.before", *FREE_TO_CHANGE}  # one run of a comparison scores the model as it came


class KeptRows:
    """Of a `runs.jsonl`, those that have a score."""

    def __init__(self, path: Path) -> None:
        """Args:
        path: The file; one that is not there has no rows.

        Raises:
            PacaError: A line is broken.
        """
        self._rows: dict[str, Row] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
            try:
                row = json.loads(line)
                if row["score"] is not None:
                    self._rows[row["name"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise PacaError(
                    f"{path}, line {number} is no row of a run ({error}). Delete the line, or the file: it is written "
                    "anew from the folders of the runs."
                ) from error

    def others(self, rows: Iterable[Row]) -> list[Row]:
        """Those of other runs than these rows are of."""
        names = {row["name"] for row in rows}
        return [row for name, row in self._rows.items() if name not in names]

    def row(self, name: str, sections: Mapping[str, Mapping[str, Any]]) -> Row | None:
        """The row of a run.

        Args:
            name: Of the run.
            sections: Its YAML. A row of a run with other settings is none of it; what the YAML leaves open (null) may
                be anything.
        """
        row = self._rows.get(name)
        return row if row is not None and _fits(sections, row["run_info"]["config"]) else None


def _fits(asked: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> bool:
    return all(
        value is None or f"{section}.{key}" in _OTHERWISE_FREE or value == found.get(section, {}).get(key)
        for section, values in json.loads(json.dumps(asked)).items()
        for key, value in values.items()
    )

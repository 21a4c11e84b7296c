"""Rows for tests, with what is not given filled in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from paca.bench.rows import Row, append_rows, read_rows, summarized

_FIELDS: dict[str, Any] = {
    "run": "abc",
    "date": "2026-11-24T00:00:00+00:00",
    "commit": "0" * 40,
    "dirty": "false",
    "machine": "Some CPU, 2 cores, Linux x86_64",
    "device": "cpu",
    "threads": "2",
    "versions": "{}",
    "command": "paca bench",
    "model": "llama3-8b",
    "scope": "blocks",
    "loss": "logits",
    "dtype": "bfloat16",
    "layers": 4,
    "hidden": 1024,
    "vocab": 256,
    "image_size": 0,
    "rank": 16,
    "optimizer": "adamw",
    "batch": 1,
    "seq": 512,
    "budget": 0,
    "method": "paca",
    "variant": "eager",
    "trainable": 1000,
    "metric": "step_time",
    "unit": "s",
    "baseline": "",
    "status": "ok",
    "note": "",
}


def row(samples: tuple[float, ...] = (1.0,), against: tuple[float, ...] | None = None, **changes: Any) -> Row:
    found = summarized(samples, against) if samples else {}
    return {**_FIELDS, **found, **changes}


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows after a trip through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        append_rows(path, rows)
        return read_rows(path)

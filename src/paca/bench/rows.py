"""Results as rows of CSV, each complete in itself."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from paca.bench.statistics import round_ratios, spread
from paca.messages.errors import PacaError


@dataclass(frozen=True)
class Row:
    """One measurement of one method."""

    run: str
    """The same for all rows of one `paca bench`: only their samples were taken side by side."""
    date: str
    commit: str
    dirty: str
    """`true` if the package's code differed from the commit."""
    machine: str
    device: str
    threads: str
    versions: str
    """JSON."""
    command: str
    model: str
    scope: str
    loss: str
    dtype: str
    layers: int
    hidden: int
    vocab: int
    """Tokens, or labels of an image classifier."""
    image_size: int
    """Pixels; 0 for text."""
    rank: int
    optimizer: str
    batch: int
    """0 where the batch size is the result."""
    seq: int
    """0 where the length is the result, and for images."""
    budget: int
    """Bytes; 0 where nothing was searched within a budget."""
    method: str
    variant: str
    """`eager` or `compiled`."""
    trainable: int
    """Trainable parameters."""
    metric: str
    unit: str
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    samples: tuple[float, ...] = ()
    """One per round; rounds of the same number in the same run were measured side by side."""
    baseline: str = ""
    """The method that the ratios are taken against, in the same variant."""
    ratio: float | None = None
    """Median of the ratios, taken round by round."""
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    status: str = "ok"
    """`ok`, `unavailable` or `failed`."""
    note: str = ""
    """Why there is no value, or how it was counted."""


_COLUMNS = tuple(field.name for field in fields(Row))
_INTEGERS = {field.name for field in fields(Row) if field.type == "int"}
_NUMBERS = {field.name for field in fields(Row) if field.type == "float | None"}


def summarized(samples: Sequence[float], baseline: Sequence[float] | None) -> dict[str, object]:
    """The fields of a row that follow from its samples and, in the same rounds, those of the baseline."""
    values = spread(samples)
    found: dict[str, object] = {
        "median": values.median,
        "q1": values.q1,
        "q3": values.q3,
        "minimum": values.minimum,
        "maximum": values.maximum,
        "samples": tuple(samples),
    }
    if baseline is not None and len(baseline) == len(samples) and all(value > 0 for value in baseline):
        ratios = spread(round_ratios(samples, baseline))
        found |= {"ratio": ratios.median, "ratio_q1": ratios.q1, "ratio_q3": ratios.q3}
    return found


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append to the file, which is made if need be.

    Raises:
        PacaError: the file has other columns.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(_COLUMNS)
        writer.writerows([_text(name, getattr(row, name)) for name in _COLUMNS] for row in rows)


def read_rows(path: Path) -> list[Row]:
    """All rows of the file.

    Raises:
        PacaError: there is no such file, it has other columns, or a number in it is none.
    """
    if not path.is_file():
        raise PacaError(f"There is no file {str(path)!r}. Rows are written by paca bench --output.")
    _check_columns(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = []
        for number, values in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(Row(**{name: _value(name, values[name] or "") for name in _COLUMNS}))  # type: ignore[arg-type]
            except ValueError as error:
                raise PacaError(f"{path}, line {number}: {error}. Remove or repair that line.") from error
    return rows


def _check_columns(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != _COLUMNS:
        raise PacaError(
            f"{str(path)!r} does not have the columns of this version's benchmarks (it has {', '.join(header[:5])} …). "
            "Write to another file."
        )


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if name == "samples":
        return " ".join(f"{sample:.10g}" for sample in value)  # type: ignore[attr-defined]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> object:
    if name == "samples":
        return tuple(float(sample) for sample in text.split())
    if name in _INTEGERS:
        return int(text)
    if name in _NUMBERS:
        return float(text) if text else None
    return text

"""Results as rows of CSV, each complete in itself: medians with their spread, and ratios taken round by round."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from paca.messages.errors import PacaError

Row = Mapping[str, Any]


def _samples(text: str) -> tuple[float, ...]:
    return tuple(float(sample) for sample in text.split())


def _number(text: str) -> float:
    return float(text) if text else float("nan")


COLUMNS: dict[str, Callable[[str], Any]] = {
    "run": str,  # the same for all rows of one `paca bench`: only their samples were taken side by side
    "date": str,
    "commit": str,
    "dirty": str,  # `true` if the package's code differed from the commit
    "machine": str,
    "device": str,
    "threads": str,
    "versions": str,  # JSON
    "command": str,
    "model": str,
    "scope": str,
    "loss": str,
    "dtype": str,
    "layers": int,
    "hidden": int,
    "vocab": int,  # tokens, or labels of an image classifier
    "image_size": int,  # pixels; 0 for text
    "rank": int,  # of the run; a method with a rank of its own has it in its name
    "optimizer": str,
    "batch": int,  # 0 where the batch size is the result
    "seq": int,  # 0 where the length is the result, and for images
    "budget": int,  # bytes; 0 where nothing was searched within a budget
    "method": str,
    "variant": str,  # `eager`, `compiled` or `cuda-graphs`
    "trainable": int,  # parameters
    "metric": str,
    "unit": str,
    "median": _number,
    "q1": _number,
    "q3": _number,
    "minimum": _number,
    "maximum": _number,
    "samples": _samples,  # one per round; rounds of one number in one run were measured side by side
    "baseline": str,  # the method that the ratios are taken against, in the same variant
    "ratio": _number,  # median of the ratios, taken round by round
    "ratio_q1": _number,
    "ratio_q3": _number,
    "status": str,  # `ok`, `unavailable` or `failed`
    "note": str,  # why there is no value, or how it was counted
}
"""Each column, with what reads it from text."""


class Spread(NamedTuple):
    """Order statistics of some samples, in their unit."""

    median: float
    q1: float
    """First quartile: a quarter of the samples lies below."""
    q3: float
    minimum: float
    maximum: float

    @property
    def noisy(self) -> bool:
        """Whether the middle half of the samples is spread over more than a quarter of the median: it then says little
        about a difference of that size."""
        return self.q3 - self.q1 > 0.25 * abs(self.median)


def spread(samples: Sequence[float]) -> Spread:
    """Summarize `samples`, at least one; quantiles between two are interpolated linearly."""
    return Spread(*pd.Series(samples, dtype=float).quantile([0.5, 0.25, 0.75, 0, 1]).tolist())


def round_ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """`samples[i] / baseline[i]`: a drift of the machine that hits a whole round cancels.

    None where the two were not measured in the same rounds, or the baseline is not above zero.
    """
    if len(samples) != len(baseline) or any(value <= 0 for value in baseline):
        return []
    return [sample / base for sample, base in zip(samples, baseline, strict=True)]


def summarized(samples: Sequence[float], baseline: Sequence[float] | None) -> dict[str, Any]:
    """The columns that follow from samples, at least one, and those of the baseline in the same rounds."""
    found: dict[str, Any] = {**spread(samples)._asdict(), "samples": tuple(samples), "status": "ok"}
    if baseline is not None and (ratios := round_ratios(samples, baseline)):
        found["ratio"], found["ratio_q1"], found["ratio_q3"] = spread(ratios)[:3]
    return found


def check_output(path: Path) -> None:
    """PacaError if rows can't be appended to the file: it has other columns, is a folder, or may not be written."""
    if path.is_dir():
        raise PacaError(f"--output {path} is a folder; a CSV file was expected. Give {path / 'results.csv'}, say.")
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir() and not path.exists():
        raise PacaError(f"--output {path} can't be made, as {there} is a file and no folder. Give another name.")
    if not os.access(there, os.W_OK):
        raise PacaError(f"--output {path} can't be written: permission denied for {there}. Give another name.")
    if path.exists() and path.stat().st_size:
        _check_columns(path)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append to the file, which is made if need be; PacaError if it has other columns. What a row lacks stays empty."""
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_columns(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def read_rows(path: Path) -> pd.DataFrame:
    """All rows of the file; PacaError if there is none, it has other columns, or a number in it is none."""
    if not path.is_file():
        raise PacaError(f"There is no file {str(path)!r}. Rows are written by paca bench --output.")
    _check_columns(path)
    try:
        return pd.read_csv(path, converters=COLUMNS, keep_default_na=False)
    except ValueError as error:
        raise PacaError(f"{path} can't be read: {error}. Look for that, and remove or repair its line.") from error


def _check_columns(path: Path) -> None:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error):
        raise PacaError(f"{str(path)!r} is no text with commas. Rows need a CSV file of their own.") from None
    if header != list(COLUMNS):
        raise PacaError(
            f"{str(path)!r} does not have the columns of this version's benchmarks (it has {', '.join(header[:5])} …). "
            "Write to another file."
        )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(_text(sample) for sample in value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)

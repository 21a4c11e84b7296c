"""The planned runs of benchmarks/selection.py, and its rows: which are there, which is next, who does it."""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

SEEDS = (1, 2)  # besides 0
RATES = 3  # tried with seed 0; one more if the best is at the edge
SAME = ("steps", "batch", "max_tokens", "held_out")
"""Settings that make rows comparable."""


@dataclass(frozen=True)
class Run:
    """What is trained."""

    data: str
    strategy: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Row:
    """One finished run."""

    date: str
    commit: str
    dirty: str
    machine: str
    device: str
    threads: str
    versions: str
    command: str
    model: str
    dtype: str
    data: str
    strategy: str
    rank: int
    alpha: int
    trainable: int
    rate: float
    seed: int
    steps: int
    batch: int
    max_tokens: int
    calibration: int
    """Training examples that columns were chosen by; 0 where none were needed."""
    tokens: int
    """Trained on, prompts included."""
    answer_tokens: int
    """Those that the loss fell on."""
    held_out: int
    """Examples that the loss is measured on."""
    loss_before: float
    loss_after: float
    seconds_choosing: float
    seconds_training: float
    """Beside other work: says nothing about speed."""


def planned(tables: list[str], strategies: list[str], done: dict[Run, float]) -> Iterator[Run | None]:
    """All runs in the order of their use; None for one that waits for others to show which it is."""
    for data in tables:
        for number in range(RATES):
            for strategy in strategies:
                yield _rate_run(Run(data, strategy, 0.0, 0), number, done)
        for strategy in strategies:
            yield from _beyond(_tried(Run(data, strategy, 0.0, 0), done), done)
    for seed in SEEDS:
        for data in tables:
            for strategy in strategies:
                tried = _tried(Run(data, strategy, 0.0, 0), done)
                tried = tried and [*tried, *_beyond(tried, done)]
                best = min(tried, key=lambda run: done[run]) if tried and all(run in done for run in tried) else None
                yield None if best is None else Run(data, strategy, best.rate, seed)


def _tried(run: Run, done: dict[Run, float]) -> list[Run]:
    """The runs at the three rates, or none as long as one of them is missing."""
    runs = [_rate_run(run, number, done) for number in range(RATES)]
    known = [run for run in runs if run is not None and run in done]
    return known if len(known) == RATES else []


def _beyond(tried: list[Run], done: dict[Run, float]) -> list[Run]:
    """One more rate where the best of the three is the lowest or the highest."""
    if not tried:
        return []
    best = min(tried, key=lambda run: done[run])
    further = {3e-4: 1e-4, 1e-2: 3e-2}.get(best.rate)
    return [] if further is None else [replace(best, rate=further)]


def _rate_run(run: Run, number: int, done: dict[Run, float]) -> Run | None:
    low, high = (Run(run.data, run.strategy, rate, run.seed) for rate in (1e-3, 3e-3))
    if number < 2:
        return (low, high)[number]
    if low not in done or high not in done:
        return None
    return Run(run.data, run.strategy, 1e-2 if done[high] < done[low] else 3e-4, run.seed)


def read_done(path: Path, settings: argparse.Namespace) -> dict[Run, float]:
    """The held-out loss of the runs with these settings in the file; infinite where it is not a number."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        Run(row["data"], row["strategy"], float(row["rate"]), int(row["seed"])): _loss(row["loss_after"])
        for row in rows
        if all(int(row[name]) == getattr(settings, name) for name in SAME)
    }


def _loss(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.inf


def append(path: Path, row: Row) -> None:
    """Write one row, whole, whoever else writes."""
    names = [field.name for field in fields(Row)]
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if path.stat().st_size == 0:
            writer.writerow(names)
        values = [getattr(row, name) for name in names]
        writer.writerow([f"{value:.8g}" if isinstance(value, float) else value for value in values])


@contextmanager
def claimed(folder: Path, run: Run) -> Iterator[bool]:
    """Whether the run is ours now. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{run.data}-{run.strategy}-{run.rate:g}-{run.seed}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True

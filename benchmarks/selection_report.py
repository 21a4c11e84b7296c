"""The table of benchmarks/selection.py, made from its rows."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selection_runs import RATES

Row = dict[str, str]


def print_report(
    path: Path,
    names: Sequence[str],
    strategies: Sequence[str],
    seeds: Sequence[int],
    settings: dict[str, int],
    missing: int,
) -> None:
    """Print a markdown table for each data set, and what is missing.

    Args:
        path: The rows.
        names: Of the planned data sets; those of the rows if empty.
        strategies: In the order of the table.
        seeds: Planned, the one that rates were tried with first.
        settings: The columns that a row must have to count.
        missing: How many of the planned runs are.
    """
    rows = [row for row in _rows(path) if all(int(row[name]) == value for name, value in settings.items())]
    if not rows:
        print(f"No rows with {settings} in {path}.")
        return
    tables = names or sorted({row["data"] for row in rows})
    rest = f"{missing} are missing" if missing else "none is missing"
    print(f"{len(rows)} runs are there, {rest} ({', '.join(f'{k} {v}' for k, v in settings.items())}).")
    for data in tables:
        mine = [row for row in rows if row["data"] == data]
        if mine:
            _print_table(mine, strategies, seeds)


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _print_table(rows: list[Row], strategies: Sequence[str], seeds: Sequence[int]) -> None:
    first = rows[0]
    found = {name: _best([row for row in rows if row["strategy"] == name], seeds) for name in strategies}
    against = found["random"]["losses"] if "random" in found else {}
    print(
        f"\n**{first['data']}**, {first['model']}, {first['dtype']}; {first['held_out']} held-out examples, base loss "
        f"{float(first['loss_before']):.4f}; {first['steps']} steps of {first['batch']}\n"
    )
    print("| strategy | rates tried: loss with seed 0 | best rate | median | min to max | seeds | less than random |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(strategies, key=lambda name: found[name]["median"]):
        mine = found[name]
        losses = mine["losses"]
        if not mine["tried"]:
            print(f"| {name} | none yet | | | | | |")
            continue
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(mine["tried"].items()))
        edge = " (at the edge)" if mine["rate"] in (min(mine["tried"]), max(mine["tried"])) else ""
        if len(mine["tried"]) < RATES:
            edge = f" (of {len(mine['tried'])} so far)"
        pairs = [against[seed] - losses[seed] for seed in losses if seed in against]
        less = f"{statistics.median(pairs):+.4f}, {sum(p > 0 for p in pairs)} of {len(pairs)}" if pairs else ""
        print(
            f"| {name} | {tried} | {mine['rate']:g}{edge} | {mine['median']:.4f} | "
            f"{min(losses.values()):.4f} to {max(losses.values()):.4f} | {len(losses)} of {len(seeds)} | "
            f"{'' if name == 'random' else less} |"
        )
    print(
        "\nLess than random: the median over seeds of random's loss minus this one's, same seed, and on how many seeds "
        "it is lower."
    )


def _best(rows: list[Row], seeds: Sequence[int]) -> dict[str, Any]:
    """The rate with the least loss on the first seed, and the losses at it by seed."""
    tried = {float(row["rate"]): float(row["loss_after"]) for row in rows if int(row["seed"]) == seeds[0]}
    finite = {rate: loss for rate, loss in tried.items() if loss == loss}
    if not finite:
        return {"tried": tried, "rate": 0.0, "losses": {}, "median": float("inf")}
    rate = min(finite, key=lambda rate: finite[rate])
    losses = {int(row["seed"]): float(row["loss_after"]) for row in rows if float(row["rate"]) == rate}
    return {"tried": tried, "rate": rate, "losses": losses, "median": statistics.median(losses.values())}

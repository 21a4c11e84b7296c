"""A method's best rate has others around it that are worse; where it has not, better ones may lie there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from paca.comparison.divergence import diverged
from paca.comparison.method_result import MethodResult, why_failed
from paca.comparison.training_process import how_to_try_again
from paca.training.folder.run_folder import RunFolder


@dataclass(frozen=True)
class Edge:
    """Why better rates of a method may lie beyond those tried."""

    note: str
    """In whole sentences."""
    failed: tuple[str, ...] = ()
    """The runs that would have told, by name."""


def edge_of(method: MethodResult, runs: Path) -> Edge | None:
    """Of a method whose best rate is the lowest or the highest that was tried, or has beside it a run that failed.

    A run that diverged is no such failure: its rate is too high, and it was tried.

    Args:
        method: With all its runs.
        runs: The folder of their folders.
    """
    if method.rate is None:
        return None
    rates = sorted({row["learning_rate"] for row in method.tried})
    untold = {row["learning_rate"]: row for row in method.failed if not diverged(row)}
    lower = [rate for rate in reversed(rates) if rate < method.rate]
    higher = [rate for rate in rates if rate > method.rate]
    # Up to the next one that has a score: behind that, none is likely to be better.
    failed = [untold[rate] for side in (lower, higher) for rate in takewhile(untold.__contains__, side)]
    sentences = [
        f"{row['name']} failed, and its rate may be better than the best one of {method.name}, {method.rate:g}: "
        f"{why_failed(row).rstrip('.')}. {how_to_try_again(RunFolder(runs / row['name']))}"
        for row in failed
    ]
    if len(rates) == 1:
        sentences.append(
            f"{method.name} was tried at one rate, {method.rate:g}; others may be better. Add some to --lr."
        )
    elif not lower or not higher:
        which, further = ("highest", "higher") if lower else ("lowest", "lower")
        sentences.append(
            f"The best rate of {method.name}, {method.rate:g}, is the {which} that was tried; {further} ones may be "
            "better. Add some to --lr."
        )
    return Edge(" ".join(sentences), tuple(row["name"] for row in failed)) if sentences else None


def caveats_of(edges: Mapping[str, Edge]) -> list[str]:
    """What a verdict has to say of them, a clause each."""
    open_ones = [name for name, edge in edges.items() if not edge.failed]
    clauses = [_clause(open_ones)] if open_ones else []
    return clauses + [
        f"{_clause([name])}, as {' and '.join(edge.failed)} failed" for name, edge in edges.items() if edge.failed
    ]


def _clause(names: Iterable[str]) -> str:
    *others, last = names
    return f"better rates of {' and '.join(filter(None, [', '.join(others), last]))} may lie beyond those tried"

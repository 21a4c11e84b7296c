"""Which runs are needed: for each method its best rate by the first seed, then the other seeds at that rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

MOST_BEYOND = 8
"""Steps that a grid is extended by, at most: a score that still gets better there is no matter of the rate."""


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-lr{self.rate:g}-seed{self.seed}"


class Outcome(NamedTuple):
    """How a run did: lower is better for both, whatever the score is."""

    score: float
    loss: float
    """On held-out data."""
    error: float = 0.0
    """The standard error of a score that is a share. Scores that lie within it are level, and the loss decides."""


FAILED = Outcome(math.inf, math.inf)

Outcomes = Callable[[Job], Outcome | None]
"""The outcome of a run; None while it has not ended."""


@dataclass(frozen=True)
class Schedule:
    """What the outcomes so far ask for."""

    jobs: list[Job]
    """Every run that is known to be needed, those that ended included. Methods take turns, so that a machine that
    drifts drifts for all of them."""
    chosen: dict[str, float]
    """The rate of each method that is found; a method is missing while it is searched, and where all rates failed."""
    expected: dict[str, int]
    """How many runs of each method there will be, as far as is known."""
    growing: bool
    """Whether there may be more: a rate is searched that may lie beyond its grid."""


def schedule(
    grids: Mapping[str, Sequence[float]], seeds: Sequence[int], outcomes: Outcomes, *, extend: bool
) -> Schedule:
    """The runs that a comparison needs by now.

    Args:
        grids: The rates of each method, by its name.
        seeds: The first one is the one that rates are searched with.
        outcomes: Of the runs that ended.
        extend: Go beyond a grid while its first or last rate is the best; else as far as such runs have ended already.
    """
    columns, chosen, expected, growing = [], {}, {}, False
    for method, rates in grids.items():
        tried, best = _search(method, rates, seeds[0], outcomes, extend)
        jobs = [Job(method, rate, seeds[0]) for rate in tried]
        hopeless = best is None and all(outcomes(job) is not None for job in jobs)
        expected[method] = len(tried) + (0 if hopeless else len(seeds) - 1)
        growing |= extend and best is None and not hopeless and 1 < len(tried) < len(rates) + MOST_BEYOND
        if best is not None:
            chosen[method] = best
            jobs += [Job(method, best, seed) for seed in seeds[1:]]
        columns.append(jobs)
    turns = chain.from_iterable(zip_longest(*columns))
    return Schedule([job for job in turns if job is not None], chosen, expected, growing)


def _search(
    method: str, rates: Sequence[float], seed: int, outcomes: Outcomes, extend: bool
) -> tuple[list[float], float | None]:
    """The rates to try, in the order in which they came up, and the best of them if it is known."""
    tried = list(rates)
    while True:
        ended = [(outcome, rate) for rate in tried if (outcome := outcomes(Job(method, rate, seed))) is not None]
        scored = [(outcome, rate) for outcome, rate in ended if outcome != FAILED]
        if len(ended) < len(tried) or not scored:
            return tried, None
        top = min(scored)[0]
        # One wrong answer of n has a standard error of one answer: two wrong are within it, not by chance of rounding.
        bound = top.score + top.error * (1 + 1e-9)
        level = [(outcome.loss, rate) for outcome, rate in scored if outcome.score <= bound + 1e-12]
        best = min(level)[1]
        beyond = _beyond(sorted(tried), best)
        if beyond is None or len(tried) >= len(rates) + MOST_BEYOND:
            return tried, best
        if not extend and outcomes(Job(method, beyond, seed)) is None:  # one that ran before counts
            return tried, best
        tried.append(beyond)


def _beyond(grid: Sequence[float], best: float) -> float | None:
    """One step of the grid's ratio beyond the best rate, where that is the grid's first or last."""
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    found = best * best / (grid[1] if best == grid[0] else grid[-2])
    rounded = float(f"{found:.3g}")
    return rounded if (rounded - best) * (found - best) > 0 else found  # a fine grid's step is lost in rounding

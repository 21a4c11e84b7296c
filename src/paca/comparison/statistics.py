"""Means over seeds and differences between methods, with the intervals that few seeds allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paca.evaluation.statistics import share_may_be_off

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval by Student's t."""

    mean: float
    half: float | None
    """Half the interval's width; None where too few values tell nothing about chance."""
    count: int
    """Of values, or of pairs."""
    paired: bool = False
    """Whether it is the mean of differences seed by seed."""

    @property
    def low(self) -> float | None:
        """The lower end."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end."""
        return None if self.half is None else self.mean + self.half


def interval_as_dict(found: Interval) -> dict[str, Any]:
    """For `comparison.json`."""
    return {"mean": found.mean, "low": found.low, "high": found.high, "count": found.count}


def mean_interval(values: Sequence[float], *, paired: bool = False) -> Interval:
    """The mean of at least one value."""
    count = len(values)
    half = None if count < 2 else _half(statistics.variance(values) / count, count - 1)
    return Interval(math.fsum(values) / count, half, count, paired)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """The mean of `one` minus that of `other`, by seed.

    With two seeds in common it is that of the pairs: a seed draws the same data order for both, so part of its luck
    cancels. Without them it is Welch's, for two samples of unequal variance; None of its half-width where a sample has
    one value.
    """
    if pairs := seeds_in_pairs(one, other):
        return mean_interval([one[seed] - other[seed] for seed in sorted(pairs)], paired=True)
    mean = statistics.fmean(one.values()) - statistics.fmean(other.values())
    if min(len(one), len(other)) < 2:
        return Interval(mean, None, min(len(one), len(other)))
    parts = [(statistics.variance(sample.values()) / len(sample), len(sample)) for sample in (one, other)]
    variance = sum(part for part, _ in parts)
    # Welch-Satterthwaite: the degrees of freedom of a sum of two estimated variances
    freedom = variance**2 / sum(part**2 / (count - 1) for part, count in parts) if variance else 1.0
    return Interval(mean, _half(variance, freedom), min(len(one), len(other)))


def seeds_in_pairs(one: Mapping[int, float], other: Mapping[int, float]) -> set[int]:
    """The seeds by which `difference` takes pairs; none where it takes two samples."""
    shared = one.keys() & other.keys()
    return shared if len(shared) > 1 or (shared and len(one) == len(other) == 1) else set()


def half_with_examples(half: float, one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of a difference's interval once the held-out examples count as drawn by chance too.

    Where all rows say which examples were right, both methods answered the same ones: what counts is the spread, over
    the examples, of the difference between the shares of seeds that had one right. It adds in squares to that of the
    seeds. What TRL's trainers measure (rewards), and rows of before 2026-11-27, say only how many were right. Then it
    is at least the width for two separate draws, which more seeds don't narrow.

    Args:
        half: By the seeds alone.
        one, other: Rows of both methods, with `right` and `score_stderr`.
    """
    sides = [[row.get("right") for row in rows] for rows in (one, other)]
    lengths = {len(right or "") for side in sides for right in side}
    if len(lengths) == 1 and min(lengths) > 1:
        shares = [[statistics.fmean(map(int, of_one)) for of_one in zip(*side, strict=True)] for side in sides]
        differences = [a - b for a, b in zip(*shares, strict=True)]
        if len(set(differences)) == 1:  # all level, or all right against all wrong: alike is no certainty
            return max(half, share_may_be_off(len(differences)))
        return math.hypot(half, _normal_half(statistics.stdev(differences) / math.sqrt(len(differences))))
    errors = [[row["score_stderr"] for row in rows if row["score_stderr"] is not None] for rows in (one, other)]
    return max(half, _normal_half(math.hypot(*(statistics.fmean(side) for side in errors if side))))


def signed(value: float) -> str:
    """A difference, for people: `+0.0012`; what rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text[1:] if float(text) == 0 else text


def bound(value: float) -> str:
    """An end of an interval, for people: with as many digits as it takes to tell on which side of nothing it is."""
    digits = next((count for count in range(4, 10) if float(f"{value:.{count}f}") != 0), 4)
    return f"{value:+.{digits}f}" if value else signed(value)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one beats in one coordinate without losing in the other; lower is better in both."""
    return [
        index
        for index, (x, y) in enumerate(points)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    ]


def _normal_half(error: float) -> float:
    """Half the width of an interval around what has this standard error."""
    return statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error


def _half(variance_of_mean: float, freedom: float) -> float:
    from scipy.stats import t  # takes half a second, which a run need not wait for

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance_of_mean)

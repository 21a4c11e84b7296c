"""Medians with their spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd


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
    """Summarize `samples`, of which there is at least one; quantiles between two are interpolated linearly."""
    return Spread(*pd.Series(samples, dtype=float).quantile([0.5, 0.25, 0.75, 0, 1]).tolist())


def round_ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """`samples[i] / baseline[i]`: a drift of the machine that hits a whole round cancels.

    Returns:
        Nothing where the two were not measured in the same rounds, or the baseline is not above zero.
    """
    if len(samples) != len(baseline) or any(value <= 0 for value in baseline):
        return []
    return [sample / base for sample, base in zip(samples, baseline, strict=True)]

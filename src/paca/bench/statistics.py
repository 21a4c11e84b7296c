"""Medians with their spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Order statistics of some samples, in their unit."""

    median: float
    q1: float
    """First quartile: a quarter of the samples lies below."""
    q3: float
    minimum: float
    maximum: float
    count: int

    @property
    def noisy(self) -> bool:
        """Whether the middle half of the samples is spread over more than a quarter of the median: it then says little
        about a difference of that size."""
        return self.q3 - self.q1 > 0.25 * abs(self.median)


def spread(samples: Sequence[float]) -> Spread:
    """Summarize `samples`; quantiles between two samples are interpolated linearly.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to summarize")
    ordered = sorted(samples)
    return Spread(
        median=_quantile(ordered, 0.5),
        q1=_quantile(ordered, 0.25),
        q3=_quantile(ordered, 0.75),
        minimum=ordered[0],
        maximum=ordered[-1],
        count=len(ordered),
    )


def round_ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """`samples[i] / baseline[i]`: a drift of the machine that hits a whole round cancels.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(samples) != len(baseline):
        raise ValueError(f"{len(samples)} rounds can't be compared with {len(baseline)}; measure both in one run")
    return [sample / base for sample, base in zip(samples, baseline, strict=True)]


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

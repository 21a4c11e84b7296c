"""The largest size that fits a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Probe(NamedTuple):
    """What one try gave."""

    fits: bool
    peak: int | None
    """Bytes, where they are known."""
    reason: str | None = None
    """Why it does not fit."""


class Limit(NamedTuple):
    """The end of a search."""

    largest: int
    """The largest size that was seen to fit; 0 if not even the smallest did."""
    smallest_too_large: int | None
    """The smallest size that was seen not to fit; None if the highest allowed one fits."""
    probes: int
    """How many tries it took."""


def largest_that_fits(
    probe: Callable[[int], Probe], *, start: int, step: int, highest: int, budget: int, tolerance: float = 0.02
) -> Limit:
    """Search the largest multiple of `step` that fits.

    A bisection that guesses: peaks of sizes that fitted are extrapolated to the budget, and every second guess within
    the bracket is its middle, so that a wrong extrapolation costs little. Ends when the bracket is at most one step,
    or `tolerance` of the size.

    Args:
        probe: Runs one size. What fits at one size must fit below it.
        start: The first size to try.
        step: Sizes are multiples of it.
        highest: No size above it is tried.
        budget: Bytes, what `Probe.peak` counts against.
        tolerance: How fine the answer has to be, as a fraction of it.
    """
    peaks: dict[int, int] = {}
    low, high = 0, None
    guess = max(step, start // step * step)
    highest = highest // step * step
    count = 0
    while True:
        count += 1
        result = probe(guess)
        if result.fits:
            low = guess
            if result.peak is not None:
                peaks[guess] = result.peak
        else:
            high = guess
        if low >= highest:
            return Limit(low, None, count)
        gap = max(step, int(tolerance * low) // step * step)
        if high is not None and high - low <= gap:
            return Limit(low, high, count)
        predicted = _predict(peaks, budget)
        if high is None:
            guess = 2 * low if predicted is None else min(max(predicted // step * step, low + gap), 8 * low)
            guess = min(guess, highest)
        elif predicted is None or count % 2:
            guess = (low + high) // 2 // step * step
        else:
            guess = min(max(predicted // step * step, low + gap), high - step)
        guess = max(guess, low + step)


def _predict(peaks: dict[int, int], budget: int) -> int | None:
    """Where a line through the two largest known peaks meets the budget."""
    if len(peaks) < 2:
        return None
    (small, low_peak), (large, high_peak) = sorted(peaks.items())[-2:]
    if high_peak <= low_peak:
        return None
    return int(large + (budget - high_peak) * (large - small) / (high_peak - low_peak))

"""The search for the largest size that fits, with machines that are only functions."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from paca.bench.limits import Limit, Probe, largest_that_fits

BUDGET = 2**30


def search(
    peak: Callable[[int], float], *, step: int = 16, highest: int = 2**20, start: int = 256, peaks_known: bool = True
) -> tuple[Limit, list[int]]:
    tried: list[int] = []

    def probe(size: int) -> Probe:
        tried.append(size)
        used = int(peak(size))
        return Probe(used <= BUDGET, used if peaks_known and used <= BUDGET else None)

    return largest_that_fits(probe, start=start, step=step, highest=highest, budget=BUDGET, tolerance=0.02), tried


SHAPES: dict[str, Callable[[int], float]] = {
    "linear": lambda n: 3e8 + 6e4 * n,
    "quadratic": lambda n: 1e8 + 6e4 * n + 8 * n * n,
    "flat, then steep": lambda n: 2e8 if n < 3000 else 2e8 + 1e6 * (n - 3000),
    "steps": lambda n: 1e8 + 5e7 * (n // 700),
}


@pytest.mark.parametrize("peaks_known", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_fits_and_a_little_more_does_not(shape: str, peaks_known: bool) -> None:
    limit, tried = search(SHAPES[shape], peaks_known=peaks_known)
    assert limit.smallest_too_large is not None
    assert SHAPES[shape](limit.largest) <= BUDGET < SHAPES[shape](limit.smallest_too_large)
    assert limit.smallest_too_large - limit.largest <= max(16, 0.02 * limit.largest)
    assert limit.largest in tried
    assert limit.smallest_too_large in tried
    assert limit.probes == len(tried) == len(set(tried))  # nothing is run twice
    assert all(size % 16 == 0 for size in tried)


def test_known_peaks_need_few_probes() -> None:
    assert search(SHAPES["linear"])[0].probes <= 5
    assert search(SHAPES["linear"], peaks_known=False)[0].probes > 8


def test_random_machines_always_end_at_a_tight_bracket() -> None:
    generator = random.Random(0)
    for _ in range(200):
        fixed, slope, bend = generator.uniform(0, 2e9), 10 ** generator.uniform(3, 7), generator.uniform(0, 30)
        limit, _ = search(lambda n, f=fixed, s=slope, b=bend: f + s * n + b * n * n, start=generator.randrange(1, 5000))
        if limit.largest:
            assert fixed + slope * limit.largest + bend * limit.largest**2 <= BUDGET
        assert limit.smallest_too_large is not None
        assert limit.smallest_too_large - limit.largest <= max(16, 0.02 * limit.largest)


def test_the_ends_of_the_range() -> None:
    assert search(lambda n: 2 * BUDGET)[0] == Limit(0, 16, 5)
    assert search(lambda n: 1, highest=5000)[0].largest == 4992
    assert search(lambda n: 1, highest=5000)[0].smallest_too_large is None
    assert search(lambda n: BUDGET * (n > 1) + 1, step=1, start=1, highest=64)[0] == Limit(1, 2, 2)

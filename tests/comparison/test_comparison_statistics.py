"""Intervals against scipy's own tests, and the Pareto front."""

from __future__ import annotations

import pytest
from scipy import stats

from paca.comparison.statistics import bound, difference, mean_interval, pareto, signed

ONE = {0: 0.81, 1: 0.83, 2: 0.80}
OTHER = {0: 0.84, 1: 0.85, 2: 0.83}


def test_an_end_of_an_interval_tells_its_side_of_nothing() -> None:
    assert [bound(value) for value in (-0.01836, -0.00001234, 0.00005, 0.0)] == [
        "-0.0184",
        "-0.00001",
        "+0.0001",
        "0.0000",
    ]
    assert signed(-0.00001234) == "0.0000"


def test_a_mean_has_students_interval() -> None:
    found = mean_interval(list(ONE.values()))
    expected = stats.ttest_1samp(list(ONE.values()), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.count == 3


def test_one_value_has_no_interval() -> None:
    found = mean_interval([0.5])
    assert (found.mean, found.half, found.low, found.high) == (0.5, None, None, None)


def test_differences_are_taken_seed_by_seed() -> None:
    found = difference(ONE, OTHER)
    expected = stats.ttest_rel(list(ONE.values()), list(OTHER.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.paired


def test_pairs_are_found_by_their_seed_not_by_their_place() -> None:
    shuffled = {2: OTHER[2], 0: OTHER[0], 1: OTHER[1], 9: 5.0}
    assert difference(ONE, shuffled) == difference(ONE, OTHER)


def test_other_seeds_are_two_samples() -> None:
    other = {seed + 10: score for seed, score in OTHER.items()} | {20: 0.9}
    found = difference(ONE, other)
    expected = stats.ttest_ind(list(ONE.values()), list(other.values()), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.paired


@pytest.mark.parametrize(("one", "other"), [({0: 1.0}, {0: 2.0}), ({0: 1.0}, {1: 2.0}), ({0: 1.0}, {1: 2.0, 2: 2.1})])
def test_a_single_seed_gives_a_difference_without_an_interval(one: dict[int, float], other: dict[int, float]) -> None:
    found = difference(one, other)
    assert found.mean == pytest.approx(1.0 - sum(other.values()) / len(other))
    assert found.half is None


@pytest.mark.parametrize("seeds", [(0, 1), (5, 6)])
def test_scores_without_any_spread_have_an_interval_of_no_width(seeds: tuple[int, int]) -> None:
    found = difference({0: 1.0, 1: 1.0}, dict.fromkeys(seeds, 0.5))
    assert (found.low, found.high) == (0.5, 0.5)


def test_the_pareto_front_has_what_nothing_beats() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (2.5, 2.0), (3.0, 1.0), (3.0, 4.0)]
    assert pareto(points) == [0, 1, 3]
    assert pareto([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]
    assert pareto([]) == []

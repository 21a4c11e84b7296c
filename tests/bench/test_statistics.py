"""Medians, spread and ratios."""

from __future__ import annotations

import pytest
import torch

from paca.bench.rows import round_ratios, spread


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_quantiles_agree_with_torch(count: int) -> None:
    samples = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    found = spread(samples.tolist())
    expected = torch.quantile(samples, torch.tensor([0.5, 0.25, 0.75, 0, 1], dtype=torch.float64)).tolist()
    assert [found.median, found.q1, found.q3, found.minimum, found.maximum] == pytest.approx(expected, rel=1e-14)


def test_ratios_round_by_round_cancel_a_drift_that_medians_would_show() -> None:
    baseline = [1.0, 1.0, 1.0, 10.0, 10.0]  # the machine slowed down
    samples = [2.0, 2.0, 2.0, 20.0, 20.0]
    assert round_ratios(samples, baseline) == [2.0] * 5
    assert spread(round_ratios([1.0, 9.0], [2.0, 3.0])).median == 1.75


def test_what_can_not_be_compared_has_no_ratio() -> None:
    assert round_ratios([1, 2], [1, 2, 3]) == []
    assert round_ratios([1, 2], [1, 0]) == []

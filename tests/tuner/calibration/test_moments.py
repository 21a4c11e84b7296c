from __future__ import annotations

import pytest
import torch

from paca.tuner.calibration import observers
from paca.tuner.calibration.observers import Moments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_moments_in_pieces_are_those_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr(observers, "_AT_ONCE", 5 * 7)
    torch.manual_seed(0)
    rows = (torch.randn(101, 7) * torch.arange(1, 8) + 3).to(dtype)
    stream = Moments(7)
    for piece in (rows[:0], rows[:1], rows[1:60], rows[60:]):
        stream.add(piece)
    whole = rows.double()
    assert stream.count == 101
    torch.testing.assert_close(stream.norms(), whole.norm(dim=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(stream.variances(), whole.var(0, correction=0), rtol=1e-12, atol=0)


def test_a_small_variance_beside_a_large_mean_survives():
    """The difference of E[x²] and E[x]² would lose it: their float64s are 1e12 apart by 1e-4."""
    rows = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-4 + 1e6
    stream = Moments(3)
    for piece in rows.split(37):
        stream.add(piece)
    expected = (rows - 1e6).var(0, correction=0)
    torch.testing.assert_close(stream.variances(), expected, rtol=1e-6, atol=0)

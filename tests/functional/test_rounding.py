from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from paca.columns.resident import ResidentColumns
from paca.columns.state import Columns
from paca.functional.rounding import add_once, round_once


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """The number of ``dtype`` next to ``value``, ties to even: by comparing exactly with its neighbours."""
    guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    bits = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}[dtype]
    around = (guess.view(bits) + torch.arange(-2, 3, dtype=bits)).view(dtype)
    around = [n for n in around if bool(n.isfinite())]
    best = min(around, key=lambda n: (abs(Fraction(float(n)) - value), int(n.view(bits)) & 1))
    return float(best)


def hard_cases(dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums on a tie of ``dtype``, and one part in 2**20 beside it, between random ones; subnormal ones for float16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, generator=generator).to(dtype)
    change = torch.randn(400, generator=generator) * 1e-2
    half = torch.finfo(dtype).eps / 2
    base[:200] = 1 + torch.arange(200) % 7 * torch.finfo(dtype).eps
    change[:200] = half / scale
    change[50:100] *= 1 + 2.0**-20
    change[100:150] *= 1 - 2.0**-20
    base[100:200] *= -1
    change[150:200] *= -1
    if dtype == torch.float16:
        base[300:] = (torch.randn(100, generator=generator) * 2**-16).to(dtype)
        change[300:] = torch.randn(100, generator=generator) * 2**-20
        base[390:], change[390:] = 2.0**-24, 2.0**-25 / scale
    return base, change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0, 0.3, -1.0])
def test_a_sum_is_rounded_once(dtype, scale):
    base, change = hard_cases(dtype, abs(scale))
    got = add_once(base, change, scale)
    assert got.dtype == dtype
    for b, c, g in zip(base, change, got, strict=True):
        assert float(g) == nearest(Fraction(float(b)) + Fraction(scale) * Fraction(float(c)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fast_sum_and_the_wide_sum_agree_bitwise(dtype):
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(1000, 300, generator=generator) * 0.02).to(dtype)
    change = torch.randn(1000, 300, generator=generator) * 1e-3
    wide = round_once(base.double() + change.double(), dtype)
    assert torch.equal(add_once(base, change, 1.0), wide)
    twice = (base.float() + change).to(dtype)
    assert not torch.equal(twice, wide)  # so that this test sees the difference


def test_infinities_and_nan_pass_through():
    base = torch.tensor([1.0, float("inf"), float("-inf"), 3e38]).bfloat16()
    change = torch.tensor([float("nan"), 1.0, 1.0, 3e38])
    got = add_once(base, change, 1.0)
    assert got[0].isnan()
    assert torch.equal(got[1:], torch.tensor([float("inf"), float("-inf"), float("inf")]).bfloat16())


def test_layouts_do_not_matter():
    base, change = torch.randn(7, 5).bfloat16(), torch.randn(5, 7)
    assert torch.equal(add_once(base, change.t(), 2.0), add_once(base, change.t().contiguous(), 2.0))
    assert add_once(base[:0], change.t()[:0], 1.0).shape == (0, 5)


def test_just_above_a_tie_between_subnormal_numbers_is_rounded_up():
    base = torch.tensor([2.0**-15]).half()
    change = torch.tensor([2.0**-25 * (1 + 2.0**-20)])  # float32 takes the sum for the tie
    assert float(add_once(base, change, 1.0)) == 2.0**-15 + 2.0**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_of_several_adapters_is_rounded_once(dtype):
    base, change = hard_cases(dtype, 1.0)
    indices, weight = torch.tensor([0]), base[:, None].clone()
    deltas = [change[:, None] * share for share in (0.25, 0.75)]
    resident = ResidentColumns(1)
    resident.want(tuple(Columns(str(i), delta, indices, 1.0) for i, delta in enumerate(deltas)))
    resident.refresh(weight)
    for b, one, other, got in zip(base, *deltas, weight[:, 0], strict=True):
        exact = Fraction(float(b)) + Fraction(float(one)) + Fraction(float(other))
        assert float(got) == nearest(exact, dtype)

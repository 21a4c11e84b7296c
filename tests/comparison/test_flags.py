"""What `--lr` and `--seeds` say."""

from __future__ import annotations

import pytest

from paca.comparison.flags import Rates, around, rates_of, seeds_of
from paca.messages.errors import PacaError


def test_rates_and_seeds_are_read() -> None:
    assert rates_of([" 1e-3, 0.003,"]) == Rates([0.001, 0.003])
    assert seeds_of("0,1, 7") == [0, 1, 7]


def test_a_method_may_have_rates_of_its_own() -> None:
    rates = rates_of(["lora=1e-4,2e-4", "1e-3", "lora-tuned = auto"])
    assert [rates.of(name) for name in ("paca", "lora", "lora-tuned")] == [[1e-3], [1e-4, 2e-4], None]


def test_without_rates_all_are_automatic() -> None:
    assert rates_of([]).of("paca") is None
    assert rates_of(["auto", "lora=1e-4"]) == Rates(None, {"lora": [1e-4]})


def test_rates_around_one_are_steps_of_1_6_of_three_digits() -> None:
    assert around(1.3e-3) == [8.12e-4, 1.3e-3, 2.08e-3]


def test_no_rates_lie_around_zero() -> None:
    with pytest.raises(PacaError, match=r"train.learning_rate is 0, and no rates lie around it. Leave it out"):
        around(0.0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["1e-3,fast"], "--lr: 'fast' is no rate; a number above zero was expected"),
        (["0"], "--lr: '0' is no rate"),
        (["nan"], "--lr: 'nan' is no rate"),
        (["inf"], "--lr: 'inf' is no rate"),
        (["auto,1e-3"], "--lr: 'auto' is no rate; a number above zero was expected, such as 1e-3, or auto alone"),
        ([""], "--lr is empty"),
        (["lora="], "--lr is empty"),
        (["1e-3,0.001"], "--lr has 0.001 twice"),
        (["1.2345671e-3,1.2345672e-3"], "--lr has 0.00123457 twice"),
        (["1e-3", "2e-3"], "--lr comes twice. Give all rates at once, with commas between"),
        (["lora=1e-3", "lora=2e-3"], "--lr comes twice for lora"),
    ],
)
def test_what_is_no_rate_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(PacaError, match=message):
        rates_of(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5", "--seeds: '1.5' is no seed"),
        ("-1", "--seeds: '-1' is no seed"),
        ("99999999999999", "is no seed; a whole number from 0 to 4294967295"),
        (",", "--seeds is empty"),
        ("1,1", "--seeds has 1 twice"),
    ],
)
def test_what_is_no_seed_is_refused(text: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        seeds_of(text)


def test_rates_of_a_method_that_is_not_compared_are_refused() -> None:
    with pytest.raises(PacaError, match=r"--lr lorra=...: no method of that name is compared. Did you mean 'lora'?"):
        rates_of(["lorra=1e-3"]).check(["paca", "lora"])

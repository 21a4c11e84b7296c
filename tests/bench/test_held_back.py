"""The tables of scores on held-back examples: weighted, and compared with LoRA's runs of the same page and seed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from benchmarks.quality.held_back import RUN, name_of, over_seeds, table


@pytest.mark.parametrize(
    ("name", "method", "rate"),
    [("a-time/lora-tuned-lr0.000304-seed0", "lora-tuned", "0.000304"), ("a/paca-lr5e-05-seed12", "paca", "5e-05")],
)
def test_a_run_is_named_by_its_page_method_rate_and_seed(name: str, method: str, rate: str) -> None:
    found = RUN.fullmatch(name)
    assert found is not None
    assert (found["method"], found["rate"], found["seed"]) == (method, rate, name.rpartition("seed")[2])


def test_a_column_is_named_by_the_comparison_and_the_run(tmp_path: Path) -> None:
    assert name_of(tmp_path / "arc-time" / "runs" / "paca-lr0.1-seed0") == "arc-time/paca-lr0.1-seed0"


ROWS = pd.DataFrame(
    {
        "weight": [10.0, 30.0],
        "p/lora-lr0.1-seed0": [1.0, 2.0],
        "p/lora-lr0.1-seed1": [1.0, 4.0],
        "other/lora-lr0.1-seed0": [9.0, 9.0],
        "p/paca-lr0.2-seed0": [1.0, 3.0],
        "p/paca-lr0.2-seed1": [1.0, 4.0],
    }
)


def test_examples_count_by_their_weights_and_seeds_are_compared_with_their_own() -> None:
    found = table(ROWS)
    assert found["mean"].tolist() == pytest.approx([1.75, 3.25, 9.0, 2.5, 3.25])
    assert found["minus lora"].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.75, 0.0])
    # One example differs by 0 and has a quarter of the weight, the other one by 1.
    exact = ((0.25 * 0.75) ** 2 + (0.75 * 0.25) ** 2) ** 0.5
    assert found.error.tolist() == pytest.approx([0.0, 0.0, 0.0, exact, 0.0])


def test_seeds_share_their_examples() -> None:
    found = over_seeds(ROWS)
    assert found.loc[("p", "paca"), "mean"] == pytest.approx((2.5 + 3.25) / 2)
    assert found.loc[("p", "paca"), "minus lora"] == pytest.approx(0.375)
    assert found.loc[("p", "paca"), "error"] == pytest.approx(((0.25 * 0.375) ** 2 + (0.75 * 0.125) ** 2) ** 0.5)
    assert found.loc[("other", "lora"), "minus lora"] == 0

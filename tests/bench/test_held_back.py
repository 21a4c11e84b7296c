"""The table of losses on held-back entries: weighted by tokens, and compared with LoRA's run of the same seed."""

from __future__ import annotations

import pandas as pd
import pytest
from benchmarks.quality.held_back import OWN, RUN, table


@pytest.mark.parametrize(
    ("name", "method", "rate"),
    [("lora-tuned-lr0.000304-seed0", "lora-tuned", "0.000304"), ("paca-lr5e-05-seed12", "paca", "5e-05")],
)
def test_a_run_is_named_by_its_method_rate_and_seed(name: str, method: str, rate: str) -> None:
    found = RUN.fullmatch(name)
    assert found is not None
    assert (found["method"], found["rate"], found["seed"]) == (method, rate, name.rpartition("seed")[2])


def test_entries_count_by_their_tokens_and_seeds_are_compared_with_their_own() -> None:
    first, last = [1.0] * OWN, [2.0] * OWN
    rows = pd.DataFrame(
        {
            "tokens": [10] * OWN + [30] * OWN,
            "lora-lr0.1-seed0": first + last,
            "lora-lr0.1-seed1": [9.0] * (2 * OWN),
            "paca-lr0.2-seed0": first + [3.0] * OWN,
        }
    )
    found = table(rows)
    assert found.loss.tolist() == pytest.approx([1.75, 9.0, 2.5])
    assert found[f"first {OWN}"].tolist() == pytest.approx([1.0, 9.0, 1.0])
    assert found["minus lora"].tolist() == pytest.approx([0.0, 0.0, 0.75])
    # Half of the entries differ by 0 and have a quarter of the tokens, the others by 1.
    exact = (OWN * (10 * 0.75) ** 2 + OWN * (30 * 0.25) ** 2) ** 0.5 / (40 * OWN)
    assert found.error.tolist() == pytest.approx([0.0, 0.0, exact])

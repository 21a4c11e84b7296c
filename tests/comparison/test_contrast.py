"""What is said of two methods of which runs failed, or which memory was made equal by."""

from __future__ import annotations

import dataclasses

import pytest

from comparison.result_maker import result
from paca.comparison.contrast import Contrast
from paca.comparison.report import method_table
from paca.comparison.results import ComparisonResult

LOST: dict[int, float | None] = {0: 1.0, 1: 1.01, 2: None, 3: None, 4: 1.005}
WHOLE: dict[int, float | None] = {0: 1.2, 1: 1.21, 2: 1.2, 3: 1.22, 4: 1.206}


def test_a_method_that_lost_seeds_is_not_called_better_by_those_that_are_left() -> None:
    found = result({"paca": LOST, "lora": WHOLE})
    assert found.contrasts[0].finding == "unknown"
    assert found.verdict.startswith(
        "No difference shown between paca and lora, as 2 of paca's 5 runs failed (loss 1.0050 against 1.2053 over the "
        "3 seeds that both have; difference -0.2003, 95 % interval -0."
    )
    assert [row[2] for row in method_table(found)[1]] == ["", "3 (2 failed)", "5"]


def test_it_is_not_called_better_as_the_other_method_either() -> None:
    found = result({"lora": WHOLE, "paca": LOST})
    assert found.contrasts[0].finding == "unknown"
    assert "between lora and paca, as 2 of paca's 5 runs failed (" in found.verdict


def test_a_method_that_lost_seeds_can_be_worse_and_what_failed_is_said() -> None:
    worse = {seed: None if score is None else score + 1 for seed, score in LOST.items()}
    found = result({"paca": worse, "lora": WHOLE})
    assert found.contrasts[0].finding == "worse"
    assert found.verdict.endswith("; 2 of paca's 5 runs failed).")
    other = result({"lora": WHOLE, "paca": worse})
    assert other.contrasts[0].finding == "better"
    assert other.verdict.endswith("; 2 of paca's 5 runs failed).")


@pytest.mark.parametrize("other", [{0: 1.0, 1: 1.3, 2: None}, {0: 1.0, 1: None, 2: None}])
def test_what_failed_is_said_where_nothing_is_shown_anyway(other: dict[int, float | None]) -> None:
    found = result({"paca": {0: 1.0, 1: 1.01, 2: None}, "lora": other})
    failed = sum(score is None for score in other.values())
    assert found.verdict.startswith("No difference shown")
    assert found.verdict.endswith(f"; 1 of paca's 3 and {failed} of lora's 3 runs failed).")


def test_runs_that_failed_at_other_rates_take_nothing_from_the_best_one() -> None:
    found = result({"paca": {0: 1.0, 1: 1.01, 4: 1.005, 2: None}, "lora": WHOLE})
    found.methods[0].tried[-1]["learning_rate"] = 1.0
    assert found.contrasts[0].finding == "better"
    assert "failed" not in found.verdict


def at_equal_memory(paca: int | None, full: int | None, of: str, equal: tuple[str, ...]) -> ComparisonResult:
    """Of a CPU where libraries take most of the memory, or of a GPU."""
    methods = result({"paca": {0: 1.0, 1: 1.01}, "full": {0: 0.8, 1: 0.82}}).methods
    for method in methods:
        for row in method.rows:
            row["train_info"]["accelerator_memory_of"] = of
    peaks = (paca, full)
    methods = [dataclasses.replace(one, equal_memory=peak) for one, peak in zip(methods, peaks, strict=True)]
    return ComparisonResult(methods, [], equal)


def told(contrast: Contrast) -> dict[str, float]:
    return contrast.as_dict()["cost"]


def test_a_method_that_does_not_fit_is_not_called_equal() -> None:
    found = at_equal_memory(800, None, "resident set of the process", ("memory",))
    assert found.verdict.startswith("Not at equal memory, as full does not fit, paca is worse than full (loss")
    assert "tensor_memory" not in told(found.contrasts[0])
    found = at_equal_memory(800, None, "CUDA allocator", ("memory", "time"))
    assert found.verdict.startswith("At equal time, but not at equal memory, as full does not fit, paca is worse than")


def test_equal_memory_on_a_cpu_is_judged_by_the_tensors_that_were_counted() -> None:
    near = at_equal_memory(800, 760, "resident set of the process", ("memory",))
    assert near.verdict.startswith("At equal memory, paca is worse than full")
    assert "peak memory, weights included (1.05 × by the bytes of tensors, which were made equal); it" in near.cost[0]
    assert told(near.contrasts[0])["tensor_memory"] == pytest.approx(800 / 760)
    far = at_equal_memory(800, 400, "resident set of the process", ("memory",))
    assert far.verdict.startswith("At 2.00 × the memory of full, paca is worse than full")


def test_equal_memory_on_a_gpu_is_judged_by_whole_runs_as_a_trial_may_miss_the_longest_batch() -> None:
    found = at_equal_memory(800, 790, "CUDA allocator", ("memory",))
    for row in found.methods[1].rows:
        row["train_info"]["accelerator_memory_max"] *= 2
    assert found.verdict.startswith("At 0.50 × the memory of full, paca is worse than full")
    assert "bytes of tensors" not in found.cost[0]


@pytest.mark.parametrize(
    ("equal", "others", "start"),
    [
        ((), 250, "At 4.00 × the parameters of lora, paca is better than lora (loss"),
        ((), 1240, "paca is better than lora (loss"),  # 1 / 1.24
        ((), 810, "paca is better than lora (loss"),
        ((), 500_000, "At 0.002 × the parameters of lora, paca is better than lora (loss"),
        (("time",), 250, "At equal time and 4.00 × the parameters of lora, paca is better than lora (loss"),
        (("parameters",), 810, "At 1.23 × the parameters of lora, paca is better than lora (loss"),
    ],
)
def test_the_verdict_says_where_one_of_both_trains_far_more_parameters(
    equal: tuple[str, ...], others: int, start: str
) -> None:
    paca, lora = result({"paca": {0: 0.9, 1: 0.91}, "lora": {0: 1.0, 1: 1.02}}).methods
    for one in lora.rows:
        one["train_info"]["num_trainable_params"] = others
    found = ComparisonResult([paca, lora], [], equal)
    assert found.verdict.startswith(start)
    assert "trains 0.00 ×" not in found.cost[0]

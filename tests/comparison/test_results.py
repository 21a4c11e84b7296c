"""What is said of runs: the verdict claims no more than they show."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import trl
from rich.console import Console

from comparison.result_maker import result, row
from paca.cli.compare import show_result
from paca.comparison import comparable
from paca.comparison.comparable import trained_alike, unlike
from paca.comparison.contrast import Contrast
from paca.comparison.edges import Edge
from paca.comparison.method_result import MethodResult
from paca.comparison.results import ComparisonResult
from paca.comparison.statistics import mean_interval

BASE = {0: 1.00, 1: 1.02, 2: 0.99}


def shifted(by: float, noise: float = 0.001) -> dict[int, float | None]:
    return {seed: score + by + noise * (seed - 1) for seed, score in BASE.items()}


def test_a_lower_loss_on_every_seed_is_better() -> None:
    found = result({"paca": shifted(-0.1), "lora": BASE})
    assert [contrast.finding for contrast in found.contrasts] == ["better"]
    assert found.verdict.startswith("paca is better than lora (loss 0.9033 against 1.0033; difference -0.1000, 95 %")
    assert found.verdict.count(".") - found.verdict.count("0.") - found.verdict.count("1.") == 1  # one sentence


def test_a_higher_loss_on_every_seed_is_worse() -> None:
    found = result({"paca": shifted(0.1), "lora": BASE})
    assert found.verdict.startswith("paca is worse than lora (")


def test_a_higher_score_is_better_where_higher_is_better() -> None:
    changed = {"metric": "exact_match", "lower_is_better": False}
    assert result({"paca": shifted(0.1), "lora": BASE}, **changed).contrasts[0].finding == "better"
    assert result({"paca": shifted(-0.1), "lora": BASE}, **changed).contrasts[0].finding == "worse"


@pytest.mark.parametrize("by", [-0.01, 0.0, 0.01])
def test_a_difference_within_the_spread_shows_nothing(by: float) -> None:
    found = result({"paca": shifted(by, noise=0.02), "lora": BASE})
    assert found.contrasts[0].finding == "none"
    assert found.verdict.startswith("No difference shown between paca and lora (loss ")
    assert "95 % interval -" in found.verdict


def test_it_is_told_where_the_loss_decided_between_rates() -> None:
    changed = {"metric": "exact_match", "lower_is_better": False, "score_stderr": 0.1, "eval_examples": 12}
    tried = [row("paca", 0, score, **{**changed, "learning_rate": rate}) for rate, score in ((1e-3, 0.4), (2e-3, 0.45))]
    tried += [row("paca", 0, 0.2, **{**changed, "learning_rate": 4e-3}), row("paca", 1, 0.9, **changed)]
    level = MethodResult("paca", "r 8", 1e-3, [tried[0], tried[3]], tried)
    alone = [row("lora", 0, score, **{**changed, "learning_rate": rate}) for rate, score in ((1e-3, 0.4), (2e-3, 0.7))]
    clear = MethodResult("lora", "r 8", 2e-3, alone[1:], alone)
    told = ComparisonResult([level, clear], []).judged_by
    assert told == [
        "Judged by exact_match on 12 held-out examples. Rates that are level by it, among which the held-out loss "
        "decided: paca (0.001, 0.002)."
    ]
    assert ComparisonResult([clear, clear], []).judged_by == ["Judged by exact_match on 12 held-out examples."]


def test_one_seed_shows_nothing_and_says_so() -> None:
    found = result({"paca": {0: 0.5}, "lora": {0: 1.0}})
    assert found.contrasts[0].finding == "unknown"
    assert found.verdict == (
        "No difference shown between paca and lora, as one seed gives no interval (loss 0.5000 against 1.0000)."
    )


def test_a_method_whose_runs_all_failed_has_no_result() -> None:
    found = result({"paca": BASE, "lora": {0: None, 1: None}})
    assert found.contrasts[0].finding == "unknown"
    assert found.verdict == "No difference shown between paca and lora, as every run of lora failed."
    assert found.as_dict()["methods"][1]["failed"] == {
        "lora-lr0.001-seed0": "out of memory",
        "lora-lr0.001-seed1": "out of memory",
    }
    assert found.cost == []


def counted(error: float | None) -> ComparisonResult:
    changed = {"metric": "exact_match", "lower_is_better": False, "score_stderr": error}
    return result({"paca": {0: 0.5, 1: 0.6}, "lora": {0: 0.4, 1: 0.5}}, **changed)


def test_the_number_of_examples_is_a_floor_of_the_interval() -> None:
    found = counted(0.15).contrasts[0]
    assert found.finding == "none"  # one more of ten right, twice
    assert found.difference is not None
    assert found.difference.half == pytest.approx(1.959964 * 0.15 * 2**0.5)
    assert counted(0.01).contrasts[0].finding == "better"
    assert counted(0.01).contrasts[0].difference.half == pytest.approx(1.959964 * 0.01 * 2**0.5)  # type: ignore[union-attr]


def answered(*right: str) -> dict[int, str]:
    return dict(enumerate(right))


def counted_one_by_one(paca: dict[int, str], lora: dict[int, str]) -> Contrast:
    """Of methods that had these examples right, by seed."""
    sides = {"paca": paca, "lora": lora}
    scores: Any = {
        name: {seed: text.count("1") / len(text) for seed, text in side.items()} for name, side in sides.items()
    }
    found = result(scores, metric="choice", lower_is_better=False, score_stderr=0.02)
    for method in found.methods:
        for one in method.rows:
            one["right"] = sides[method.name][one["seed"]]
    return found.contrasts[0]


@pytest.mark.parametrize("count", [5, 20, 600])
def test_the_same_answers_to_a_few_examples_are_no_certainty(count: int) -> None:
    alike = "1" * (count // 2) + "0" * (count - count // 2)
    found = counted_one_by_one(answered(alike, alike, alike), answered(alike, alike, alike)).difference
    assert found is not None
    assert found.mean == 0
    assert found.half == pytest.approx(1.96**2 / (count + 1.96**2), rel=1e-4)


def test_all_right_against_all_wrong_is_a_difference() -> None:
    right, wrong = "1" * 40, "0" * 40
    found = counted_one_by_one(answered(right, right, right), answered(wrong, wrong, wrong))
    assert found.difference is not None
    assert found.difference.half == pytest.approx(1.96**2 / (40 + 1.96**2), rel=1e-4)
    assert found.finding == "better"


def test_examples_that_both_methods_answered_are_compared_one_by_one() -> None:
    few, more = "1" * 300 + "0" * 300, "1" * 330 + "0" * 270
    found = counted_one_by_one(answered(few, few, few), answered(more, more, more))
    # 30 of 600 more, and never one fewer: the standard error of a mean of 570 zeros and 30 ones
    error = (0.05 * 0.95 / 599) ** 0.5
    assert found.difference is not None
    assert found.difference.half == pytest.approx(1.959964 * error)
    assert found.finding == "worse"
    others = "0" * 270 + "1" * 330  # as many right, of other questions
    assert counted_one_by_one(answered(few, few, few), answered(others, others, others)).finding == "none"


def test_the_spread_over_seeds_and_over_examples_add_up() -> None:
    one, other = answered("1100", "1110", "1000"), answered("0110", "1010", "0010")
    found = counted_one_by_one(one, other).difference
    of_seeds = mean_interval([0.0, 0.25, 0.0]).half
    shares = [1 - 1 / 3, 2 / 3 - 1 / 3, 1 / 3 - 1, 0.0]
    assert found is not None
    assert of_seeds is not None
    assert found.half == pytest.approx((of_seeds**2 + (1.959964 * statistics.stdev(shares) / 2) ** 2) ** 0.5)


def test_equal_differences_of_all_seeds_are_no_certainty() -> None:
    found = result({"paca": {0: 0.5, 1: 0.75}, "lora": {0: 0.25, 1: 0.5}}, metric="reward", lower_is_better=False)
    assert found.contrasts[0].finding == "unknown"
    assert counted(None).contrasts[0].finding == "unknown"  # 0.1 twice, but for rounding
    assert "all seeds differ by the same, which gives no interval" in found.verdict
    alike = result({"paca": {0: 0.5, 1: 0.75}, "lora": {0: 0.5, 1: 0.75}}, metric="reward", lower_is_better=False)
    assert "all seeds differ by the same, which gives no interval" in alike.verdict


def test_a_failed_seed_leaves_the_others_paired() -> None:
    found = result({"paca": shifted(-0.1), "lora": {**BASE, 2: None}})
    difference = found.contrasts[0].difference
    assert difference is not None
    assert (difference.count, difference.paired) == (2, True)


def test_means_times_and_examples_are_those_of_the_seeds_that_are_compared() -> None:
    compared = result({"paca": {0: 2.5, 1: 2.6, 2: 2.0}, "lora": {0: 2.45, 1: 2.5501}})
    for one in compared.methods[0].tried:
        one["train_info"]["train_time"] = {0: 10.0, 1: 10.0, 2: 100.0}[one["seed"]]
    [contrast] = compared.contrasts
    assert contrast.cost()["train_time"] == 0.5
    assert "loss 2.5500 against 2.5000 over the 2 seeds that both have; difference +0.0499" in compared.verdict
    settings = {"metric": "choice", "lower_is_better": False, "score_stderr": 0.1}
    shares = result({"paca": {0: 0.5, 1: 0.6, 2: 0.9}, "lora": {0: 0.5, 1: 0.5}}, **settings)
    rights = {"paca": ["1100", "1101", "0000"], "lora": ["1100", "0101"]}
    for method in shares.methods:
        for one in method.tried:
            one["right"] = rights[method.name][one["seed"]]
    left_out = result({"paca": {0: 0.5, 1: 0.6}, "lora": {0: 0.5, 1: 0.5}}, **settings)
    for method in left_out.methods:
        for one in method.tried:
            one["right"] = rights[method.name][one["seed"]]
    assert shares.contrasts[0].difference == left_out.contrasts[0].difference


def test_each_other_method_has_its_clause() -> None:
    found = result({"paca": shifted(-0.1), "lora": BASE, "full": shifted(-0.1, noise=0.05)})
    better, none = found.verdict.split("; no difference")
    assert better.startswith("paca is better than lora")
    assert none.startswith(" shown between paca and full")


def test_the_verdict_says_what_was_equal() -> None:
    methods = result({"paca": shifted(-0.1), "lora": BASE}).methods
    assert ComparisonResult(methods, [], ("time",)).verdict.startswith("At equal time, paca is better than lora (loss")


@pytest.mark.parametrize(
    ("equal", "name"),
    [("parameters", "num_trainable_params"), ("time", "train_time"), ("memory", "accelerator_memory_max")],
)
def test_the_verdict_says_how_far_from_equal_it_was(equal: str, name: str) -> None:
    paca, lora, ia3 = result({"paca": shifted(-0.1), "lora": BASE, "ia3": BASE}).methods
    for one in ia3.rows:
        one["train_info"][name] /= 40
    verdict = ComparisonResult([paca, lora, ia3], [], (equal,)).verdict
    assert verdict.startswith(f"At equal {equal}, paca is better than lora (loss")
    assert f"; at 40.00 × the {equal} of ia3, paca is better than ia3 (loss" in verdict
    only = ComparisonResult([paca, ia3], [], (equal,)).verdict
    assert only.startswith(f"At 40.00 × the {equal} of ia3, paca is better than ia3")


def test_the_verdict_says_of_each_thing_whether_it_was_equal() -> None:
    paca, lora = result({"paca": shifted(-0.1), "lora": BASE}).methods
    both = ("parameters", "time")
    assert ComparisonResult([paca, lora], [], both).verdict.startswith("At equal parameters and time, paca is better")
    for one in lora.rows:
        one["train_info"]["train_time"] *= 2
    verdict = ComparisonResult([paca, lora], [], both).verdict
    assert verdict.startswith("At equal parameters and 0.50 × the time of lora, paca is better than lora")


def test_one_method_has_nothing_to_be_compared_with() -> None:
    assert result({"paca": BASE}).verdict == "There is one method, paca, and nothing to compare it with."


def test_runs_judged_by_different_data_are_not_compared() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in bad.rows:
        one["run_info"]["config"]["data"]["eval"] = "other"
    found = ComparisonResult([good, bad], [])
    assert found.verdict == (
        "No difference shown between paca and lora, as they were not judged by the same: data.eval (e or other)."
    )
    assert found.contrasts[0].finding == "unknown"
    assert found.as_dict()["contrasts"][0]["difference"] is None


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "template", "zephyr"),
        ("train", "trainer", "dpo"),
        ("train", "max_length", 38),
        ("train", "completion_only_loss", False),
        ("eval", "answer_pattern", "x"),
    ],
)
def test_runs_whose_losses_mean_something_else_are_not_compared(section: str, key: str, value: object) -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in bad.rows:
        one["run_info"]["config"][section][key] = value
    shown = "false" if value is False else value
    assert f"judged by the same: {section}.{key} (none or {shown})." in ComparisonResult([good, bad], []).verdict


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"packing": True}, "a loss over batches of 8 and a loss over batches of 8 packed"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "a loss over batches of 8 and a loss over batches of 8 of like length",
        ),
        ({"per_device_eval_batch_size": 1}, "a loss over batches of 1 and a loss over batches of 8"),
        ({"packing": True, "eval_packing": False}, None),
    ],
)
def test_losses_over_other_batches_are_not_compared_and_those_over_tokens_are(
    changed: dict[str, object], told: str | None
) -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in bad.rows:
        one["run_info"]["config"]["train"] |= changed
    verdict = ComparisonResult([good, bad], []).verdict
    assert verdict.startswith("paca is better") if told is None else f"not judged by the same: {told}." in verdict
    for one in (*good.rows, *bad.rows):
        one["run_info"]["config"]["eval"]["metric"] = "loss"
    assert ComparisonResult([good, bad], []).verdict.startswith("paca is better")


def with_contents(rows: list[dict[str, Any]], **contents: str) -> None:
    for one in rows:
        one["run_info"]["contents"] = {name.replace("_", ".", 1): value for name, value in contents.items()}


@pytest.mark.parametrize("key", ["data_eval", "model_name", "data_template"])
def test_runs_whose_files_changed_under_the_same_name_are_not_compared(key: str) -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    same = {"data_train": "t", "data_eval": "e", "model_name": "m", "data_template": "f"}
    with_contents(good.rows, **same)
    with_contents(bad.rows, **same)
    assert ComparisonResult([good, bad], []).verdict.startswith("paca is better")
    with_contents(bad.rows, **{**same, key: "other"})
    told = f"not judged by the same: the content of {key.replace('_', '.', 1)}."
    assert told in ComparisonResult([good, bad], []).verdict


def test_a_model_may_come_quantized_and_a_head_be_drawn_by_the_seed() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in (*good.rows, *bad.rows):
        one["run_info"]["contents"] = {"model.name": f"{one['method']} {one['seed']}"}
    for one in bad.rows:
        one["run_info"]["config"]["model"]["quantization"] = "nf4"
    assert ComparisonResult([good, bad], []).verdict.startswith("paca is better")


def test_held_out_data_that_was_split_off_is_known_by_all_of_it() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in (*good.rows, *bad.rows):
        one["run_info"]["config"]["data"]["eval"] = 0.1
    with_contents(good.rows, data_train="t")
    with_contents(bad.rows, data_train="other")
    assert "not judged by the same: the content of data.train." in ComparisonResult([good, bad], []).verdict


def test_runs_scored_on_another_number_of_examples_are_not_compared() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in bad.rows:
        one["eval_examples"] = 10
    assert "eval_examples (none or 10)" in ComparisonResult([good, bad], []).verdict


def test_answers_are_compared_wherever_the_training_loss_falls() -> None:
    good, other = result({"paca": shifted(0.1), "lora": BASE}, metric="exact_match", lower_is_better=False).methods
    for one in other.rows:
        one["run_info"]["config"]["train"]["completion_only_loss"] = False
    assert ComparisonResult([good, other], []).contrasts[0].finding == "better"


def test_held_out_data_that_was_split_off_depends_on_the_training_data() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for number, method in enumerate((good, bad)):
        for one in method.rows:
            one["run_info"]["config"]["data"] = {"train": f"t{number}", "eval": 8}
    assert "data.train" in ComparisonResult([good, bad], []).verdict


def test_cost_is_told_as_a_multiple() -> None:
    paca = row("paca", 0, 1.0)
    paca["train_info"] |= {"train_time": 15.0, "accelerator_memory_max": 2**29, "num_trainable_params": 2000}
    methods = [MethodResult("paca", "", 1e-3, [paca], [paca]), *result({"lora": {0: 1.0}}).methods]
    found = ComparisonResult(methods, [])
    assert found.cost == [
        "By one run of each, paca takes 0.75 × the training time of lora and 0.50 × its peak memory, weights included; "
        "it trains 2.00 × the parameters."
    ]


def test_times_for_other_work_are_not_compared() -> None:
    paca, lora = row("paca", 0, 1.0, steps=12), row("lora", 0, 1.0, steps=6)
    methods = [MethodResult(one["name"], "", 1e-3, [one], [one]) for one in (paca, lora)]
    (cost,) = ComparisonResult(methods, []).cost
    assert "training time" not in cost
    assert f"× {lora['name']}'s peak memory" in cost
    assert "training time" in " ".join(ComparisonResult(methods, [], ("time",)).cost)


def test_times_of_a_busy_machine_are_called_that_and_not_compared() -> None:
    found = result({"paca": shifted(-0.1), "lora": BASE})
    assert len(found.cost) == 1
    slowest = found.methods[1].tried[1]
    slowest["train_info"]["train_time"] *= 2
    steps = sorted(one["train_info"]["train_time"] / one["steps"] for one in found.methods[1].tried)
    assert f"took lora {steps[0]:.3g} to {steps[-1]:.3g} s, so the machine" in found.cost[1]
    assert found.cost[0] == ("paca takes 1.00 × lora's peak memory, weights included; it trains 1.00 × the parameters.")


def test_training_time_has_an_interval_over_the_seeds() -> None:
    found = result({"paca": shifted(-0.1), "lora": BASE})
    for method, times in zip(found.methods, ((15.0, 16.0, 14.0), (20.0, 20.0, 20.0)), strict=True):
        for one, time in zip(method.rows, times, strict=True):
            one["train_info"]["train_time"] = time
    # ln(0.75), ln(0.8), ln(0.7): mean -0.2892, standard error 0.0386, t = 4.303
    assert "takes 0.75 × the training time of lora (95 % interval 0.63 to 0.88) and" in found.cost[0]


def test_what_else_differs_is_named() -> None:
    rows = [row("paca", 0, 1.0), row("lora", 0, 1.0, steps=9)]
    rows[1]["meta_info"] = {**rows[1]["meta_info"], "package_info": {"torch": "3"}}
    assert unlike(rows) == ["steps", "versions of libraries"]
    assert unlike(rows[:1]) == []


def test_products_in_another_precision_are_named_and_unknown_ones_not() -> None:
    rows = [row("paca", 0, 1.0), row("paca", 1, 1.0), row("lora", 0, 1.0)]
    rows[0]["run_info"]["contents"] = {"products": "float32"}
    assert unlike(rows) == []
    rows[2]["run_info"]["contents"] = {"products": "bfloat16"}
    assert unlike(rows) == ["precision of products"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("packing", True, "packing"),
        ("data_seed", 7, "seed of the data's order"),
        ("train_sampling_strategy", "group_by_length", "order of the data"),
        ("max_length", 64, "longest sequence"),
        ("packing_strategy", "wrapped", "way of packing"),
        ("shuffle_dataset", True, "shuffling"),
    ],
)
def test_runs_that_see_their_data_otherwise_are_not_trained_alike(key: str, value: Any, told: str) -> None:
    rows = [row("paca", 0, 1.0), row("lora", 0, 1.0)]
    assert trained_alike(rows)
    rows[1]["run_info"]["config"]["train"][key] = value
    assert unlike(rows) == [told]
    assert not trained_alike(rows)


def test_it_all_goes_into_json() -> None:
    found = json.loads(json.dumps(result({"paca": shifted(-0.1), "lora": BASE, "bad": {0: None}}).as_dict()))
    assert found["contrasts"][0]["finding"] == "better"
    assert found["contrasts"][0]["difference"]["paired"] is True
    assert found["methods"][0]["score"]["mean"] == pytest.approx(0.9033, abs=1e-4)
    assert found["methods"][2]["score"] is None
    assert found["score_before"] == 2.0


def test_the_terminal_tells_of_the_edge_too() -> None:
    output = io.StringIO()
    found = dataclasses.replace(
        result({"paca": BASE, "lora": BASE}), edges={"paca": Edge("The best rate of paca is the lowest.")}
    )
    show_result(found, Path("compared"), Console(file=output, width=200))
    assert "\nThe best rate of paca is the lowest.\n" in output.getvalue()
    assert found.verdict.endswith("; better rates of paca may lie beyond those tried.")


@pytest.mark.parametrize(
    ("open_ones", "hedged"), [(("lora",), True), (("paca",), False), (("paca", "lora", "full"), True)]
)
def test_a_finding_that_a_better_rate_might_turn_says_so_first(open_ones: tuple[str, ...], hedged: bool) -> None:
    found = dataclasses.replace(
        result({"paca": shifted(-0.1), "lora": BASE}),
        edges={name: Edge("The best rate is the lowest.") for name in open_ones},
    )
    assert "paca is better than lora" in found.verdict
    assert found.verdict.startswith("At the rates tried, ") == hedged
    assert found.as_dict()["contrasts"][0]["rates_open"] == [name for name in open_ones if name != "full"]
    if len(open_ones) > 2:
        assert "better rates of paca, lora and full may lie" in found.verdict


def test_what_runs_take_by_default_is_what_the_trainers_say() -> None:
    fields = {f.name: f.default for kind in (trl.SFTConfig, trl.GRPOConfig) for f in dataclasses.fields(kind)}
    for key, value in comparable._BY_DEFAULT.items():
        assert fields[key.removeprefix("train.")] == value


def test_a_default_that_is_spelled_out_is_the_same() -> None:
    good, bad = result({"paca": shifted(-0.1), "lora": BASE}).methods
    for one in bad.rows:
        one["run_info"]["config"]["train"]["truncation_mode"] = "keep_start"
    assert ComparisonResult([good, bad], []).verdict.startswith("paca is better")

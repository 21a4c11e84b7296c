"""What a comparison is prepared to; measurements are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from comparison.small_comparison import small_comparison
from paca.comparison import prepare
from paca.comparison.equal import CameOut
from paca.comparison.flags import Rates
from paca.comparison.methods import Method
from paca.comparison.plan_table import PlannedMethod, settings_text, table_of, work_text
from paca.comparison.settings import Comparison, check_calibration, run_sections
from paca.comparison.trial import Trial, Try
from paca.messages.errors import PacaError


def made_up_plan(comparison: Comparison, method: Method, **_: bool) -> SimpleNamespace:
    assert method.rank is not None
    each = {"paca": 100, "lora": 200}[method.kind]
    train = {"learning_rate": 1.0 / method.rank, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    config = SimpleNamespace(train=train)
    return SimpleNamespace(trainable_parameters=each * method.rank, steps=60, config=config)


def made_up_trials(comparison: Comparison, claim: object, **_: bool) -> Try:
    def attempt(method: Method, steps: int) -> Trial:
        assert method.rank is not None
        batch = method.sections.get("train", {}).get("per_device_train_batch_size", 8)
        peak = {"paca": 100, "lora": 130}[method.kind] * batch + 10 * method.rank
        return Trial(steps * {"paca": 1.0, "lora": method.rank / 4}[method.kind], peak)

    return attempt


def test_parameters_and_time_are_made_equal_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "plan_of", made_up_plan)
    monkeypatch.setattr(prepare, "trials_of", made_up_trials)
    comparison = small_comparison(tmp_path, equal=("parameters", "time"))
    comparison.methods[0] = comparison.methods[0].with_rank(32)
    paca, lora = prepare.prepare(comparison, Console(quiet=True))
    assert lora.method.rank == 16  # as many parameters as paca's 32
    assert lora.method.sections["train"]["max_steps"] == 15  # at that r a step takes four times as long
    assert comparison.methods[1] == lora.method
    grids = {"paca": [1e-2, 3e-2], "lora": [1e-2, 3e-2]}
    told = work_text([paca, lora], grids, seeds=3, extend=True)
    twenty_minutes = "about 20:00 of training by the steps just timed, without evaluations"  # 240 steps of 1 s, of 4 s
    more = ", more where a best rate is at an end of its grid (--no-extend: none)"
    assert told == f"at least 8 runs, 480 steps in all, {twenty_minutes}{more}"
    plain = told.removeprefix("at least ").removesuffix(more)
    assert work_text([paca, lora], grids, seeds=3, extend=False) == plain


@pytest.mark.parametrize(("dtype", "quantization", "left"), [
    ("float32", None, ["paca", "lora"]),
    ("float32", "nf4", ["paca", "lora", "lora-tuned"]),
    ("bfloat16", None, ["paca", "lora", "lora-tuned"]),
    ("bfloat16, tuned", None, ["paca", "lora"]),
])  # fmt: skip
def test_tuned_lora_is_left_out_where_it_is_lora_again(
    dtype: str, quantization: str | None, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_of(comparison: Comparison, method: Method, **_: bool) -> SimpleNamespace:
        plan = made_up_plan(comparison, method)
        plan.config.model = SimpleNamespace(quantization=quantization)
        return SimpleNamespace(**vars(plan), dtype=dtype)

    monkeypatch.setattr(prepare, "plan_of", plan_of)
    rates = Rates([1e-3], {"lora-tuned": [2e-3]})
    comparison = small_comparison(tmp_path, "paca,lora,lora-tuned", rates=rates)
    if dtype.endswith("tuned"):
        tuned = {**comparison.common.get("train", {}), "autocast_adapter_dtype": False}
        comparison.common = {**comparison.common, "train": tuned}
    console = Console(record=True, width=200)
    planned = prepare.prepare(comparison, console)
    assert [one.method.name for one in planned] == [method.name for method in comparison.methods] == left
    assert ("lora-tuned is left out" in console.export_text()) == (len(left) == 2)


@pytest.mark.parametrize("names", ["lora-tuned,lora,paca", "paca,lora-tuned,lora", "lora,lora-tuned"])
def test_the_twin_that_is_left_out_is_the_tuned_one_wherever_it_stands(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_of(comparison: Comparison, method: Method, **_: bool) -> SimpleNamespace:
        plan = made_up_plan(comparison, method)
        plan.config.model = SimpleNamespace(quantization=None)
        return SimpleNamespace(**vars(plan), dtype="float32")

    monkeypatch.setattr(prepare, "plan_of", plan_of)
    comparison = small_comparison(tmp_path, names, rates=Rates([1e-3], {}))
    if "paca" in names:
        planned = prepare.prepare(comparison, Console(quiet=True))
        assert [one.method.name for one in planned] == [name for name in names.split(",") if name != "lora-tuned"]
    else:
        with pytest.raises(PacaError, match=r"There is nothing to compare lora with\. Give --methods another one"):
            prepare.prepare(comparison, Console(quiet=True))


def test_memory_and_time_are_made_equal_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "plan_of", made_up_plan)
    monkeypatch.setattr(prepare, "trials_of", made_up_trials)
    comparison = small_comparison(tmp_path, equal=("memory", "time"))
    _, lora = prepare.prepare(comparison, Console(quiet=True))
    train = lora.method.sections["train"]
    assert (train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == (4, 2)
    assert lora.method.rank == 44  # what fits into paca's 960 beside half a batch
    assert train["max_steps"] == 5  # at that r a step takes eleven times as long
    assert {name: lora.came_out.measured[name] for name in ("peak", "step_ratio")} == {"peak": 960, "step_ratio": 11.0}


def test_rates_that_nobody_gave_follow_the_method_made_equal_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[bool] = []

    def plan_of(comparison: Comparison, method: Method, fetch: bool = False) -> SimpleNamespace:
        fetched.append(fetch)
        return made_up_plan(comparison, method)

    monkeypatch.setattr(prepare, "plan_of", plan_of)

    def prepared(rates: Rates, *, dry_run: bool = False) -> Comparison:
        comparison = small_comparison(tmp_path, equal=("parameters",), rates=rates)
        comparison.methods[0] = comparison.methods[0].with_rank(32)
        prepare.prepare(comparison, Console(quiet=True), dry_run=dry_run)
        return comparison

    with monkeypatch.context() as patch:  # as where a dry run doesn't know the size of the weights
        patch.setattr(prepare, "around", lambda rate: [2 * rate])
        assert prepared(Rates(), dry_run=True).grids() == {"paca": [2 / 32], "lora": [2 / 16]}
    assert not any(fetched)
    assert prepared(Rates(None, {"lora": [1e-3]})).grids() == {"paca": [0.0195, 0.0312, 0.05], "lora": [1e-3]}
    monkeypatch.setattr(prepare, "around", lambda rate: [rate])  # another rule, of another version
    assert prepared(Rates()).grids() == {"paca": [0.0195, 0.0312, 0.05], "lora": [1 / 16]}  # lora had none yet
    assert fetched[-2:] == [False, True]
    assert prepared(Rates(), dry_run=True).grids()["lora"] == [1 / 16]
    assert prepared(Rates()).grids()["paca"] == [0.0195, 0.0312, 0.05]
    assert not any(fetched[-4:])


def test_a_method_that_does_not_fit_has_its_steps_timed_and_no_memory(tmp_path: Path) -> None:
    """Its table ended in a KeyError."""
    comparison, planned = small_comparison(tmp_path), []
    for method, peak in zip(comparison.methods, ({"peak": 2**20}, {}), strict=True):
        plan: Any = SimpleNamespace(**vars(made_up_plan(comparison, method)), sequences_per_step=8)
        planned.append(PlannedMethod(CameOut(method, {"step_seconds": 1.0, "step_ratio": 1.0, **peak}), plan))
    console = Console(record=True, width=200)
    console.print(table_of(planned))
    assert [line.rstrip().endswith("1.00 MiB") for line in console.export_text().splitlines()] == [False, True, False]


def test_a_wrong_key_of_a_method_is_told_without_a_file_that_nobody_wrote(tmp_path: Path) -> None:
    """It was line 39 of configs/mine.yaml."""
    (tmp_path / "lora.yaml").write_text("lora: {r: 8, alpha: 16}\n")
    comparison = small_comparison(tmp_path, f"paca,mine={tmp_path / 'lora.yaml'}", rates=Rates([1e-3]))
    with pytest.raises(PacaError, match=r"^The method mine: there is no key lora\.alpha\. Did you mean"):
        prepare.plan_of(comparison, comparison.methods[1])


def test_a_number_that_a_method_lacks_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **options: bool) -> None:
        raise PacaError("peft.num_virtual_tokens is missing: how many tokens are learned.")

    monkeypatch.setattr(prepare, "prepare_run", lacking)
    comparison = small_comparison(tmp_path, "paca,prompt_tuning", rates=Rates([1e-3]))
    place = r"file of the method's own, with peft: {peft_type: PROMPT_TUNING, num_virtual_tokens: \.\.\.} in it: --meth"
    with pytest.raises(PacaError, match=rf"^The method prompt_tuning: peft\.num_virtual_tokens is missing.* {place}"):
        prepare.plan_of(comparison, comparison.methods[1])


def test_calibration_goes_to_the_methods_that_use_it_and_one_must(tmp_path: Path) -> None:
    (tmp_path / "eva.yaml").write_text("lora: {init_lora_weights: eva}\n")
    for methods in ("paca,lora", f"paca,eva={tmp_path / 'eva.yaml'}"):
        comparison = small_comparison(tmp_path, methods, rates=Rates([1e-3]))
        comparison.common = {**comparison.common, "calibration": {"sequences": 64}}
        paca, lora = (
            run_sections(comparison.common, method, 1e-3, 0, tmp_path / "run") for method in comparison.methods
        )
        if methods == "paca,lora":
            with pytest.raises(PacaError, match=r"calibration has no effect: none of the methods"):
                check_calibration(comparison.common, comparison.methods)
        else:
            check_calibration(comparison.common, comparison.methods)
            assert "calibration" not in paca
            assert lora["calibration"]["sequences"] == 64


def test_a_mapping_is_told_by_its_content_and_of_layers_by_their_number() -> None:
    method = Method("eva", {"lora": {"r": 4, "eva_config": {"rho": 2.0}, "rank_pattern": {"q_proj": 2}}})
    assert settings_text(method) == "r 4, eva_config (rho 2.0), rank_pattern for 1 name"


def test_a_setting_for_many_names_is_told_by_their_number() -> None:
    patterns = {f"blocks.{block}.conv": 16 for block in range(10)}
    method = Method("paca", {"paca": {"r": 256, "target_modules": ["conv", "proj"], "rank_pattern": patterns}})
    assert settings_text(method) == "r 256, target_modules conv/proj, rank_pattern for 10 names"

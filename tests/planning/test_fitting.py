from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import config

import paca
from paca.lean import float32_products
from paca.planning import Setting, estimate, fit, fitting, step_seconds
from paca.planning.budget import warn_if_too_large
from paca.planning.device_rates import MatmulRate, fixed_rate, measure_rate
from paca.planning.fitting import TECHNIQUES
from paca.planning.memory_estimate import FRAMEWORK, prepare_model

BASE = Setting(sequence_length=256, chunked_loss=False, padded=None)
SHAPE = {"dtype": torch.float32, "vocab_size": 100, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """Each of its estimates is made once: searches repeat them."""
    shared = prepare_model(config("llama", **SHAPE), paca.PacaConfig(r=8))
    made: dict[Setting, Any] = {}

    def once(model: Any, setting: Setting) -> Any:
        if model is not shared:
            return estimate(model, setting)
        if setting not in made:
            made[setting] = estimate(model, setting)
        return made[setting]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "estimate", once)
        yield shared


def total(model: Any, **settings: Any) -> int:
    return fitting.estimate(model, replace(BASE, **settings)).total


@pytest.mark.parametrize(("device", "techniques"), [("cuda", ["none"]), ("cpu", ["lean blocks", "none"])])
def test_with_room_enough_nothing_is_given_up(model: Any, device: Any, techniques: list[str]) -> None:
    found = fit(model, replace(BASE, device=device), memory=2**40, global_batch=4)
    assert (found.setting.batch_size, found.setting.gradient_accumulation) == (4, 1)
    # Nothing can be faster, so nothing else is tried; on a CPU lean blocks are.
    assert [candidate.setting.techniques() for candidate in found.candidates] == techniques


@pytest.mark.slow(reason="simulates models over and over")
def test_what_is_found_fits_and_the_next_larger_batch_does_not(model: Any) -> None:
    budget = total(model, batch_size=3, gradient_accumulation=2, lean=True)
    found = fit(model, BASE, memory=budget, global_batch=6, rate=fixed_rate(1e12))
    assert found.setting.techniques() == "lean blocks"  # the fewest operations, and batches run at the same rate
    assert (found.setting.batch_size, found.setting.gradient_accumulation) == (3, 2)
    for candidate in found.candidates:
        setting = candidate.setting
        assert setting.batch_size * setting.gradient_accumulation == 6
        assert candidate.estimate.total <= budget or not candidate.fits
    assert total(model, batch_size=6, lean=True) > budget


@pytest.mark.slow(reason="simulates models over and over")
def test_batches_of_several_sequences_are_searched_with_a_mask() -> None:
    base = Setting(sequence_length=256, device="cuda")
    model = prepare_model(config("llama", **SHAPE | {"dtype": torch.bfloat16}), paca.PacaConfig(r=8))
    masked, bare = (estimate(model, replace(base, batch_size=2, padded=padded)).total for padded in (True, False))
    assert bare < masked
    assert fit(model, base, memory=masked, global_batch=2).setting.batch_size == 2
    less = fit(model, base, memory=masked - 1, global_batch=2, techniques=TECHNIQUES[:2])
    assert less.setting != replace(base, batch_size=2)
    alone = fit(model, base, memory=2**40, global_batch=1)
    assert alone.best.estimate.total == estimate(model, replace(base, padded=False)).total
    packed = fit(model, replace(base, padded=True), memory=2**40, global_batch=1)
    assert packed.best.estimate.total > alone.best.estimate.total


def test_a_search_keeps_to_the_techniques_and_the_batch_that_are_asked_for(model: Any) -> None:
    options: dict[str, Any] = {"memory": 2**40, "global_batch": 4}
    found = fit(model, BASE, techniques=(TECHNIQUES[3],), batch_size=2, **options)
    assert [candidate.setting.techniques() for candidate in found.candidates] == ["activation checkpointing"]
    assert (found.setting.batch_size, found.setting.gradient_accumulation) == (2, 2)
    with pytest.raises(paca.PacaError, match="batches of 3 don't make up"):
        fit(model, BASE, batch_size=3, **options)
    with pytest.raises(paca.PacaError, match="can't be made lean"):
        fit(config("bloom"), BASE, techniques=(TECHNIQUES[1],), adapter=paca.PacaConfig(r=8), **options)
    room = estimate(model, BASE).parts
    with pytest.raises(paca.PacaError, match="2 sequences at a time"):
        fit(model, BASE, memory=room["weights"] + room[FRAMEWORK] + 1, global_batch=4, batch_size=2)


def test_less_memory_takes_leaner_settings(model: Any) -> None:
    budget = total(model, lean=True)
    assert budget < total(model)
    found = fit(model, BASE, memory=budget, global_batch=1)
    assert found.setting.lean
    assert not found.setting.checkpointing
    assert [candidate.fits for candidate in found.candidates] == sorted(
        (c.fits for c in found.candidates), reverse=True
    )


def test_a_device_that_is_slow_on_short_batches_is_given_longer_ones(model: Any) -> None:
    budget = max(
        total(model, batch_size=1, gradient_accumulation=4),
        total(model, batch_size=2, gradient_accumulation=2, checkpointing=True),
    )
    short_batches_are_slow = MatmulRate({256: 1e11, 512: 1e12}, "made up")
    assert fit(model, BASE, memory=budget, global_batch=4).setting.batch_size == 1
    found = fit(model, BASE, memory=budget, global_batch=4, rate=short_batches_are_slow)
    assert found.setting.batch_size > 1
    assert found.setting.checkpointing or found.setting.lean


def test_nothing_fits_says_how_much_is_needed(model: Any) -> None:
    with pytest.raises(paca.PacaError, match=r"the weights .* alone take"):
        fit(model, BASE, memory=2**20, global_batch=4)
    room = estimate(model, BASE).parts
    with pytest.raises(paca.PacaError, match=r"Nothing fits into .* the least is .*256"):
        fit(model, BASE, memory=room["weights"] + room[FRAMEWORK] + 1, global_batch=1)
    with pytest.raises(paca.PacaError, match="global batch"):
        fit(model, BASE, memory=2**40, global_batch=0)


def test_what_a_model_refuses_is_reported() -> None:
    small = estimate(config("bloom"), BASE, paca.PacaConfig(r=8))
    budget = estimate(config("bloom"), replace(BASE, checkpointing=True), paca.PacaConfig(r=8)).total
    assert budget < small.total
    found = fit(config("bloom"), BASE, memory=budget, global_batch=1, adapter=paca.PacaConfig(r=8))
    assert found.setting.checkpointing
    assert len(found.refused) == 1
    assert "can't be made lean" in found.refused[0]


def test_any_loss_tries_both(model: Any) -> None:
    budget = total(model)
    found = fit(model, BASE, memory=budget, global_batch=1, any_loss=True)
    assert not found.setting.chunked_loss  # fewer operations
    found = fit(model, BASE, memory=budget - 1, global_batch=1, any_loss=True)
    assert {candidate.setting.chunked_loss for candidate in found.candidates} == {False, True}


def test_time_is_work_over_rate() -> None:
    rate = MatmulRate({100: 1e9, 400: 3e9}, "made up")
    assert [rate.at(rows) for rows in (50, 100, 200, 400, 9999)] == pytest.approx([5e8, 1e9, 2e9, 3e9, 3e9])
    result = estimate(config("llama"), Setting(100), paca.PacaConfig(r=8))
    assert step_seconds(result, rate) == result.flops / 1e9
    with pytest.raises(paca.PacaError, match="above 0"):
        fixed_rate(0)


def test_a_rate_can_be_measured_here() -> None:
    rate = measure_rate("cpu", torch.float32, features=32, seconds=0.02)
    assert all(value > 0 for value in rate.measured.values())
    assert "float32" in rate.source


@pytest.mark.parametrize(("load", "told"), [(0.4, None), (0.6, 0.6), (None, None)])
def test_a_measured_rate_tells_the_load_of_a_busy_machine(
    load: float | None, told: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_average() -> tuple[float, float, float]:
        if load is None:
            raise OSError("not known")
        return load, 9.0, 9.0

    monkeypatch.setattr(os, "getloadavg", load_average)
    assert measure_rate("cpu", torch.float32, features=32, seconds=0.02).load == told


@pytest.mark.slow(reason="simulates models over and over")
def test_the_time_of_lean_blocks_is_that_of_the_table() -> None:
    rate = fixed_rate(1e9)
    found = fit(config("llama"), Setting(64, lean=True, device="cpu"), memory=2**40, global_batch=4, rate=rate)
    best = found.best
    assert best.setting.lean
    assert best.seconds == step_seconds(best.estimate, rate) == pytest.approx(0.97 * best.estimate.flops / 1e9)


@pytest.mark.parametrize(("slower", "made_in_float32"), [(1.9, True), (1.1, False)])
def test_a_rate_is_that_of_the_products_that_a_run_makes(
    slower: float, made_in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_products, "times_as_slow", lambda dtype: slower)
    products: list[int] = []
    made = float32_products._PRODUCTS["mm"]
    noting = {"mm": lambda *values: [products.append(1), made(*values)][1]}
    monkeypatch.setattr(float32_products, "_PRODUCTS", float32_products._PRODUCTS | noting)
    rate = measure_rate("cpu", torch.bfloat16, features=512, seconds=0.02)
    assert bool(products) == made_in_float32
    assert rate.source.endswith("in bfloat16, products in float32" if made_in_float32 else "in bfloat16")


def test_a_warning_comes_exactly_when_memory_is_short() -> None:
    model = prepare_model(config("llama"), paca.PacaConfig(r=8))
    setting = Setting(sequence_length=64, batch_size=2)
    needed = estimate(model, setting).total
    assert warn_if_too_large(model, setting, available=needed) is None
    message = warn_if_too_large(model, setting, available=needed - 1)
    assert message is not None
    assert "2 sequences of 64 tokens" in message
    assert "paca plan" in message

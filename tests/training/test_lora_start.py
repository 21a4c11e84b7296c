"""Starts of LoRA that a run makes from its data, or by a randomized SVD, and what it leaves of them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from paca.training import RunResult, describe, load_run_config, lora_start, starting_model, train
from paca.training.planned_run import target_of_run
from training.method_runs import TOKENS_ASKED, answers_of_trained

TAKEN = ("corda", "lora_ga", "pissa_niter_4")
"""Those that take from the weights what the adapter begins with."""


def start(config_file: Path, folder: Path, name: str, *overrides: str, **options: Any) -> RunResult:
    given = ["paca=null", f"output.dir={folder}", "train.max_steps=2", "lora.r=4", f"lora.init_lora_weights={name}"]
    return train(load_run_config(config_file, [*given, *overrides]), **{"console": Console(quiet=True), **options})


@pytest.fixture(scope="module")
def started(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunResult]:
    """A run with the start of a name, once for all tests: they leave its folder as it is."""

    @functools.cache
    def run(name: str) -> RunResult:
        return start(config_file, tmp_path_factory.mktemp("started") / "run", name)

    return run


@pytest.mark.parametrize("name", TAKEN)
def test_what_was_trained_comes_back_as_plain_lora(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained = answers_of_trained(monkeypatch)
    scaled = ("lora.use_rslora=true", "lora.rank_pattern={q_proj: 2}", "lora.alpha_pattern={v_proj: 3}")
    folder = start(config_file, tmp_path / "run", name, *scaled, "lora.use_dora=true").folder
    left = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (left["init_lora_weights"], left["r"], left["rank_pattern"]) == (True, 8, {"q_proj": 4})
    found = load_for_generation(folder).model(TOKENS_ASKED).logits
    assert (found - trained[-1]).abs().max() <= 1e-5 * found.abs().max()

    (checkpoint, *_) = (folder / "checkpoints").glob("checkpoint-*")  # which has the factors alone
    with pytest.raises(PacaError, match=rf"init_lora_weights: {name}, and PEFT did not save what that takes out"):
        load_for_generation(checkpoint)


@pytest.mark.parametrize("name", TAKEN)
def test_in_16_bits_it_comes_back_to_their_rounding(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained = answers_of_trained(monkeypatch)
    folder = start(config_file, tmp_path / "run", name, "model.dtype=bfloat16").folder
    found = load_for_generation(folder).model(TOKENS_ASKED).logits
    assert (found - trained[-1]).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * found.abs().max()


@pytest.mark.parametrize("name", ["eva", *TAKEN])
def test_a_run_begins_with_the_model_as_it_came(started: Callable[[str], RunResult], name: str) -> None:
    begun, plain = (started(kind).summary for kind in (name, "true"))
    assert begun is not None
    assert plain is not None
    assert begun["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-5)
    assert begun["eval_loss_after"] != pytest.approx(plain["eval_loss_after"], rel=1e-4)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_the_start_follows_from_the_training_data(
    config_file: Path,
    started: Callable[[str], RunResult],
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [started(name)]  # from at most 128 sequences
    for number, more in enumerate(("calibration.sequences=32", "data.limit=24")):
        runs.append(start(config_file, tmp_path / f"{number}", name, more, console=None))
        assert "Starting LoRA by" in capsys.readouterr().out
    (one, again, other) = (load_file(result.folder / "start.safetensors") for result in runs)
    assert all(torch.equal(one[key], again[key]) for key in one)  # the data has 32
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_evas_ranks_are_counted_as_they_are_shared_out(config_file: Path, tmp_path: Path) -> None:
    result = start(config_file, tmp_path / "run", "eva", "lora.target_modules=all-linear")
    assert result.summary is not None
    left = json.loads((result.folder / "adapter/adapter_config.json").read_text())
    assert left["rank_pattern"]
    trained = load_file(result.folder / "adapter/adapter_model.safetensors")
    assert result.summary["trainable_parameters"] == sum(tensor.numel() for tensor in trained.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibration.batch_size=1", "calibration.max_length=4"], r"each batch needs 8 tokens that count \(r × eva"),
        (["lora.eva_config={tau: 1.0}"], r"eva can't be made: its directions did not settle in 3 passes"),
        (["lora.target_modules=[embed_tokens]"], r"it is for linear layers, and \S+embed_tokens is Embedding"),
    ],
)
def test_a_start_that_can_not_be_made_says_why(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(lora_start, "_PASSES", 3)
    with pytest.raises(PacaError, match=message):
        start(config_file, tmp_path / "run", "eva", *overrides)


def test_eva_of_more_directions_than_a_layer_has_is_refused_in_the_dry_run(config_file: Path) -> None:
    """So a comparison at equal memory tries no such r; it failed there."""
    given = ["paca=null", "lora.init_lora_weights=eva"]
    describe(load_run_config(config_file, [*given, "lora.r=16"]))
    for more in ("lora.r=32", "lora.rank_pattern={v_proj: 32}"):
        with pytest.raises(PacaError, match=r"can't be made: r × eva_config.rho is 64, and a layer has 32 features"):
            describe(load_run_config(config_file, [*given, more]))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("lora={init_lora_weights: corda}", r"lora\.init_lora_weights: corda\), from at most 128 training examples"),
        ("paca={selection: gradient_norm}", r"paca\.selection: gradient_norm\), from at most 128 training examples"),
        ("lora={}", None),
    ],
)
def test_a_plan_says_of_what_pass_over_the_data_it_tells_nothing(
    config_file: Path, section: str, told: str | None
) -> None:
    before = target_of_run(config_file, ["paca=null", section], "cpu", 32, 1).before
    assert (before is None) == (told is None)
    assert told is None or re.search(told, str(before))


def test_loftq_needs_a_gpu_and_not_all_of_its_settings(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that were left out were a KeyError; on a CPU PEFT fails of CUDA."""
    monkeypatch.setattr(starting_model, "is_cuda_available", lambda: False)
    monkeypatch.setattr(starting_model, "is_xpu_available", lambda: False)
    with pytest.raises(PacaError, match=r"init_lora_weights: loftq is computed on a GPU by PEFT, and there is none"):
        start(config_file, tmp_path / "run", "loftq", "lora.loftq_config={loftq_bits: 4}")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "lora.init_lora_weights=evva",
            r"--set: .* orthogonal, mica or lora_ga, not the text 'evva'. Did you mean eva",
        ),
        ("lora.eva_config.roh=2", r"--set: there is no key lora\.eva_config\.roh\. Did you mean lora\.eva_config\.rho"),
    ],
)
def test_a_mistake_about_a_start_is_told_with_its_place(config_file: Path, override: str, told: str) -> None:
    with pytest.raises(PacaError, match=told):
        load_run_config(config_file, ["paca=null", "lora.init_lora_weights=eva", override])

"""`model.attn_implementation`: a run and its plan compute attention as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.training import describe, load_run_config, train
from paca.training.planned_run import target_of_run
from training.test_lean_runs import watch_models

EAGER = "model.attn_implementation=eager"


def test_a_run_computes_attention_as_asked(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = watch_models(monkeypatch)
    config = load_run_config(config_file, [f"output.dir={tmp_path / 'run'}", "train.max_steps=1", EAGER])
    train(config, console=Console(quiet=True))
    assert [model.get_base_model().config._attn_implementation for model in models] == ["eager"]


def test_a_plan_counts_the_matrix_that_eager_attention_keeps(config_file: Path) -> None:
    saved = []
    for overrides in ([], [EAGER]):
        target = target_of_run(config_file, overrides, "cpu", 128, None)
        for layer in target.model.model.layers:
            layer.self_attn.attention_dropout = 0.0  # with dropout a CPU has no fused attention
        saved.append(sum(estimate(target.model, target.setting, target.adapter).saved.values()))
    assert saved[1] > saved[0]


def described(config_file: Path, overrides: list[str]) -> object:
    return describe(load_run_config(config_file, overrides))


def planned(config_file: Path, overrides: list[str]) -> object:
    return target_of_run(config_file, overrides, "cpu", 128, None)


@pytest.mark.parametrize("look", [described, planned])
def test_a_mistyped_implementation_is_named_before_the_model_is_loaded(
    config_file: Path, look: Callable[[Path, list[str]], object]
) -> None:
    with pytest.raises(PacaError, match=r"^model\.attn_implementation: .*egaer.*eager"):
        look(config_file, ["model.attn_implementation=egaer"])

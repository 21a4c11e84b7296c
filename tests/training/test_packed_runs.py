"""How many steps a packed run makes is known before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from paca.data import sample
from paca.messages.errors import PacaError
from paca.training import RunResult, describe, load_run_config
from training.tiny_run import adapter


@pytest.mark.slow(reason="trains several times")
@pytest.mark.parametrize("size", [1, 2])
def test_a_packed_run_makes_the_steps_that_its_plan_told(
    config_file: Path, finished: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    packed = [
        "data.limit=20",
        "train.max_steps=-1",
        "train.num_train_epochs=2",
        "train.packing=true",
        "train.max_length=48",
    ]
    packed += ["train.gradient_accumulation_steps=1", f"train.per_device_train_batch_size={size}"]
    plan, summary = describe(load_run_config(config_file, packed)), finished(*packed).summary
    assert summary is not None
    assert summary["steps"] == plan.steps
    lines = dict(plan.lines())
    assert lines["steps"] == str(plan.steps)
    assert plan.data.packed is not None
    each = summary["tokens"] / (2 * plan.data.packed.sequences)
    assert plan.tokens_per_step == round(size * each)
    assert lines["tokens per step"].startswith(f"about {plan.tokens_per_step} ({size} sequence")
    assert "warmup_steps" not in plan.own_defaults or plan.own_defaults["warmup_steps"] == plan.steps * 3 // 100
    monkeypatch.setattr(sample, "SAMPLED", 10)
    guess = describe(load_run_config(config_file, packed))
    assert guess.steps is None
    assert re.fullmatch(r"about \d+, known once all of the data is packed", dict(guess.lines())["steps"])


def test_a_packed_run_of_one_step_trains(config_file: Path, finished: Callable[..., RunResult]) -> None:
    settings = ["train.max_steps=-1", "train.num_train_epochs=1", "train.packing=true", "train.max_length=128"]
    settings += ["train.gradient_accumulation_steps=32"]
    result = finished(*settings)
    assert result.summary is not None
    assert (result.summary["steps"], result.summary["config"]["train"]["warmup_steps"]) == (1, 0)
    assert any(tensor.any() for name, tensor in adapter(result.folder).items() if name.endswith("paca_delta"))
    for share in (1, 0.03):
        with pytest.raises(PacaError, match=r"would train nothing. Leave out train\.warmup_steps"):
            describe(load_run_config(config_file, [*settings, f"train.warmup_steps={share}"]))
    with pytest.raises(PacaError, match=r"don't fill a batch .*dataloader_drop_last"):
        describe(
            load_run_config(
                config_file, [*settings, "train.per_device_train_batch_size=32", "train.dataloader_drop_last=true"]
            )
        )

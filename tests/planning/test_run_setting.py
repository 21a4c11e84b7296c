from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import config

import paca
from paca.planning import Setting, estimate, setting_of_run, warn_if_too_large
from paca.planning.estimate import prepare_model
from paca.training import load_run_config
from paca.training.train_settings import with_defaults


def run_config(folder: Path, **train: Any) -> Any:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "some/model"}, "data": {"train": "a.jsonl"}, "train": train}))
    run = load_run_config(path)
    run.train = with_defaults(run.train, has_eval=False, weights_dtype=torch.float32, context_length=2048)
    return run


def test_a_run_becomes_the_setting_that_it_trains_under(tmp_path: Path) -> None:
    run = run_config(
        tmp_path,
        max_length=512,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        gradient_checkpointing=True,
        bf16=True,
        optim="sgd",
    )
    assert setting_of_run(run, "cpu") == Setting(
        sequence_length=512,
        batch_size=2,
        gradient_accumulation=3,
        checkpointing=True,
        padded=True,
        autocast=torch.bfloat16,
        optimizer="sgd",
    )
    assert setting_of_run(run, "cpu", longest=100).sequence_length == 100


def test_one_sequence_at_a_time_needs_no_mask_unless_it_is_packed(tmp_path: Path) -> None:
    assert not setting_of_run(run_config(tmp_path, per_device_train_batch_size=1), "cpu").padded
    assert setting_of_run(run_config(tmp_path, per_device_train_batch_size=1, packing=True), "cpu").padded


def test_a_run_without_a_limit_can_not_be_planned_until_the_longest_example_is_known(tmp_path: Path) -> None:
    run = run_config(tmp_path, max_length=None)
    with pytest.raises(paca.PacaError, match="max_length"):
        setting_of_run(run, "cpu")
    assert setting_of_run(run, "cpu", longest=77).sequence_length == 77


def test_a_warning_comes_exactly_when_memory_is_short() -> None:
    model = prepare_model(config("llama"), paca.PacaConfig(r=8))
    setting = Setting(sequence_length=64, batch_size=2)
    needed = estimate(model, setting).total
    assert warn_if_too_large(model, setting, available=needed) is None
    message = warn_if_too_large(model, setting, available=needed - 1)
    assert message is not None
    assert "2 sequences of 64 tokens" in message
    assert "paca plan" in message

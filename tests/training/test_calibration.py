"""Columns chosen on a run's own data: the same as paca.select's, kept in the run folder, used again while they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainingArguments

import paca
from paca.messages.errors import PacaError
from paca.training import calibration, describe, load_run_config, train
from paca.training.calibration import calibration_batches
from paca.training.config.train_settings import training_arguments
from paca.training.prepare import prepare
from paca.tuner.calibration import selecting
from tiny_checkpoint import byte_tokenizer
from training.tiny_run import adapter

SMALL = ["calibration.sequences=6", "calibration.max_length=24", "calibration.batch_size=4", "train.max_steps=2"]
SMALL += ["data.eval=null"]  # nobody looks at the losses


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The strategies for which batches ran through a model."""
    seen: list[str] = []
    collect = selecting.collect_scores

    def noted(model: Any, targets: Any, strategy: str, *rest: Any) -> Any:
        seen.append(strategy)
        return collect(model, targets, strategy, *rest)

    monkeypatch.setattr(selecting, "collect_scores", noted)
    return seen


def start(config_file: Path, folder: Path, *overrides: str, resume: bool = False) -> Any:
    config = load_run_config(config_file, [f"output.dir={folder}", *SMALL, *overrides])
    return train(config, resume=resume, console=Console(quiet=True))


def batches_of(config_file: Path, folder: Path, *overrides: str, with_labels: bool) -> Any:
    config = load_run_config(config_file, [f"output.dir={folder}", *SMALL, *overrides])
    prepared = prepare(config)
    arguments = training_arguments(prepared.plan.config.train, folder / "checkpoints")
    return calibration_batches(
        prepared.plan.data.train, byte_tokenizer(), arguments, config.calibration, with_labels=with_labels
    )


def test_batches_are_what_the_trainer_would_make_cut_and_spread(config_file, tmp_path):
    batches = batches_of(config_file, tmp_path, with_labels=False)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    assert max(int(batch["attention_mask"].sum(1).max()) for batch in batches) == 24
    labelled = batches_of(config_file, tmp_path, with_labels=True)
    for batch in labelled:
        answered = batch["labels"] != -100
        assert bool(answered.any(1).all())  # cut at the front: the answer is there
        assert torch.equal(batch["labels"][answered], batch["input_ids"][answered])
        assert not bool(answered.all())  # the prompt does not count


@pytest.mark.parametrize("strategy", ["weight_norm", "activation_variance", "gradient_norm"])
def test_a_run_trains_the_columns_that_select_finds(config_file, tmp_path, strategy, passes):
    result = start(config_file, tmp_path / "run", f"paca.selection={strategy}")
    assert passes == ([] if strategy == "weight_norm" else [strategy])
    kept = json.loads((tmp_path / "run" / "columns.json").read_text())
    base = result.summary["model"]["name"]
    model = AutoModelForCausalLM.from_pretrained(base)
    batches = batches_of(config_file, tmp_path, with_labels=strategy == "gradient_norm")
    selected = paca.select(model, paca.PacaConfig(r=4, selection=strategy), batches)
    assert kept["indices"] == selected.indices
    trained = adapter(tmp_path / "run")
    for name, columns in selected.indices.items():
        assert trained[f"base_model.model.{name}.paca_indices"].tolist() == columns
    loaded = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    config = loaded.peft_config["default"]
    assert config.selection == strategy
    assert config.indices == selected.indices


@pytest.mark.slow(reason="trains several times")
def test_the_columns_are_used_again_until_a_setting_or_the_data_changes(config_file, tmp_path, passes):
    strategy, folder = "paca.selection=activation_norm", tmp_path / "run"
    start(config_file, folder, strategy)
    first = adapter(folder)
    assert len(passes) == 1
    start(config_file, folder, strategy, "output.overwrite=true", "train.learning_rate=1e-3", "paca.paca_alpha=1")
    assert len(passes) == 1
    again = adapter(folder)
    assert all(torch.equal(first[name], again[name]) for name in first if name.endswith("indices"))
    for changed in ("calibration.sequences=5", "paca.r=3", "data.limit=20", "paca.selection=activation_variance"):
        count = len(passes)
        start(config_file, folder, strategy, "output.overwrite=true", changed)
        assert len(passes) == count + 1, changed


def test_another_models_columns_are_not_used(config_file, tmp_path, passes):
    model = AutoModelForCausalLM.from_pretrained(load_run_config(config_file).model.name)
    run = load_run_config(config_file, [f"output.dir={tmp_path / 'run'}", *SMALL, "paca.selection=activation_norm"])
    prepared = prepare(run)
    arguments = training_arguments(prepared.plan.config.train, tmp_path / "checkpoints")
    choice = calibration.ColumnChoice(
        prepared.plan.config, prepared.plan.data.train, arguments, tmp_path / "columns.json", Console(quiet=True)
    )
    found = choice.adapter(model)
    assert choice.adapter(model).indices == found.indices
    assert len(passes) == 1
    model.lm_head.weight.data.mul_(1.5)
    choice.adapter(model)
    assert len(passes) == 2
    (tmp_path / "columns.json").write_text('{"key": ')
    assert choice.adapter(model).indices == found.indices
    assert len(passes) == 3


def test_resume_goes_on_with_the_same_columns_without_choosing_again(config_file, tmp_path, passes):
    strategy, folder = "paca.selection=gradient_norm", tmp_path / "run"
    start(config_file, folder, strategy)
    whole = adapter(folder)
    (folder / "summary.json").unlink()
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    start(config_file, folder, strategy, resume=True)
    assert len(passes) == 1
    resumed = adapter(folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_dry_run_says_how_columns_will_be_chosen_and_chooses_none(config_file, tmp_path, passes):
    for strategy, words in {
        "random": "random",
        "weight_norm": "weight_norm: those of largest norm in the weights",
        "activation_variance": "activation_variance, from at most 6 training examples cut to 24 tokens",
    }.items():
        run = load_run_config(config_file, [f"output.dir={tmp_path}", *SMALL, f"paca.selection={strategy}"])
        plan = describe(run)
        assert dict(plan.lines())["columns"] == words
        assert plan.config.adapter["selection"] == strategy
        assert plan.config.adapter["indices"] is None
    assert passes == []


def test_what_does_not_work_out_is_said(config_file, tmp_path):
    with pytest.raises(PacaError, match=r"--set: paca\.selection must be one of .*Did you mean activation_norm\?"):
        load_run_config(config_file, ["paca.selection=activation_nrom"])
    with pytest.raises(PacaError, match=r"--set: calibration\.sequences is 0; it must be 1 or more"):
        load_run_config(config_file, ["calibration.sequences=0"])
    with pytest.raises(PacaError, match=r"there is no key calibration\.sequence\. Did you mean calibration\.sequences"):
        load_run_config(config_file, ["calibration.sequence=3"])
    with pytest.raises(PacaError, match=r"r=400 columns were asked for"):
        start(config_file, tmp_path / "run", "paca.selection=activation_norm", "paca.r=400")


@pytest.mark.parametrize("says", [None, True, False])
def test_the_model_is_where_the_trainer_would_place_it(monkeypatch: pytest.MonkeyPatch, says: bool | None) -> None:
    """transformers says nothing, None, where it decides by itself."""
    arguments = TrainingArguments("unused", use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "place_model_on_device", property(lambda _: says))
    model = Mock(spec=["to"])
    calibration.place(model, arguments)
    assert [call.args for call in model.to.call_args_list] == ([] if says is False else [(arguments.device,)])

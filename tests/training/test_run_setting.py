from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import paca
from paca.planning import Setting
from paca.planning.optimizer_state import state_bytes
from paca.training import load_run_config
from paca.training.config.train_settings import with_defaults
from paca.training.run_setting import setting_of_run


def run_config(folder: Path, **train: Any) -> Any:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "some/model"}, "data": {"train": "a.jsonl"}, "train": train}))
    run = load_run_config(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    run.train = with_defaults(run.train, model, has_eval=False)
    return run


@pytest.mark.parametrize("kind", ["language model", "convolutions", "modules_to_save"])
def test_factors_count_as_what_the_optimizer_keeps(tmp_path: Path, kind: str) -> None:
    setting = setting_of_run(run_config(tmp_path, max_length=512, factor_rank=4), "cpu")
    adapter: dict[str, Any] = {"r": 16, "paca_alpha": 16}
    if kind == "convolutions":
        model: Any = torch.nn.Sequential(torch.nn.Conv2d(32, 8, 3), torch.nn.Conv1d(32, 8, 3))
        adapter["target_modules"] = ["0", "1"]
    else:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 32}
        model = LlamaForCausalLM(LlamaConfig(**shape))
        adapter["modules_to_save"] = ["lm_head"] if kind == "modules_to_save" else None
    model = peft.get_peft_model(model, paca.PacaConfig(**adapter))
    deltas = [p for p in model.parameters() if p.requires_grad]
    optimizer = paca.FactoredAdamW(deltas, rank=4)
    for delta in deltas:
        delta.grad = torch.ones_like(delta)
    optimizer.step()
    kept = [value for delta in deltas for value in optimizer.state[delta].values() if torch.is_tensor(value)]
    assert state_bytes(setting.optimizer, deltas) == sum(value.nbytes for value in kept)


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
        padded=None,
        autocast=torch.bfloat16,
        optimizer="sgd",
    )
    assert setting_of_run(run, "cpu", longest=100).sequence_length == 100
    assert setting_of_run(run, "cpu", longest=100, lengths=65).lengths == 65
    run.train["pad_to_multiple_of"] = 64
    assert setting_of_run(run, "cpu", longest=100, lengths=65).lengths == 2


def test_one_sequence_at_a_time_needs_no_mask_unless_it_is_packed(tmp_path: Path) -> None:
    for size, packing, masked in ((1, False, False), (1, True, True), (2, False, True)):
        run = run_config(tmp_path, per_device_train_batch_size=size, packing=packing)
        assert setting_of_run(run, "cpu").masked == masked


def test_a_run_without_a_limit_can_not_be_planned_until_the_longest_example_is_known(tmp_path: Path) -> None:
    run = run_config(tmp_path, max_length=None)
    with pytest.raises(paca.PacaError, match="max_length"):
        setting_of_run(run, "cpu")
    assert setting_of_run(run, "cpu", longest=77).sequence_length == 77

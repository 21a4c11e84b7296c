"""Rotation in transformers' Trainer: when it happens, and that a run resumed in the middle of it is the same run."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import paca
from models import llama
from paca.layers import paca_layers


def data():
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 64, (7,), generator=g) for _ in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted(**settings):
    config = paca.PacaConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "rotate_every": 2, "task_type": "CAUSAL_LM", **settings}
    )
    return peft.get_peft_model(llama(attention_dropout=0.1), config)


def trainer(folder, model=None, callbacks=(), **settings):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 9,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "linear",
            "report_to": [],
            "save_strategy": "steps",
            "save_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            **settings,
        }
    )
    return Trainer(model or adapted(), arguments, train_dataset=data(), callbacks=[*callbacks, paca.RotateColumns()])


def file(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Watch(TrainerCallback):
    """Notes, at the end of each step, which columns were trained and how old the optimizer's state is."""

    def __init__(self):
        self.columns, self.ages = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.columns.append(paca.trained_columns(kwargs["model"]))
        optimizer = kwargs["optimizer"]
        self.ages.append({int(s["step"]) for s in optimizer.optimizer.state.values()})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    watch = Watch()
    whole = trainer(folder, callbacks=[watch])
    whole.train()
    return folder, whole, watch


def test_the_columns_change_every_so_many_steps_and_the_schedule_goes_on(uninterrupted):
    folder, whole, watch = uninterrupted
    assert watch.ages == [{1}, {2}, {1}, {2}, {1}, {2}, {1}, {2}, {1}]
    assert watch.columns[0::2][:4] == watch.columns[1::2]  # those of steps 1 and 2, 3 and 4, ...
    q_proj = "model.layers.0.self_attn.q_proj"
    turns = [set(columns[q_proj]) for columns in watch.columns[::2]]
    assert len(set().union(*turns)) == 5 * 4
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.05 * (1 - step / 9) for step in range(9)])
    # A checkpoint holds what was trained up to its step and nothing that is still to come.
    ranks = [file(folder / f"checkpoint-{n}")[f"base_model.model.{q_proj}.paca_indices"].numel() for n in range(1, 10)]
    assert ranks == [4, 4, 8, 8, 12, 12, 16, 16, 20]


@pytest.mark.parametrize("step", [3, 4])  # in the middle of a turn, and between two
def test_a_resumed_run_is_the_same_run_bit_for_bit(uninterrupted, tmp_path, step):
    folder, whole, watch = uninterrupted
    later = Watch()
    resumed = trainer(tmp_path, callbacks=[later])
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert later.columns == watch.columns[step:]
    assert later.ages == watch.ages[step:]
    assert same(file(tmp_path / "checkpoint-9"), file(folder / "checkpoint-9"))
    for one, two in zip(paca_layers(resumed.model), paca_layers(whole.model), strict=True):
        assert torch.equal(one.base_layer.weight, two.base_layer.weight)
    configs = [json.loads((f / "checkpoint-9" / "adapter_config.json").read_text()) for f in (folder, tmp_path)]
    assert configs[0] == configs[1]


def test_the_best_checkpoint_is_loaded_into_the_rotated_adapter(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    model = adapted()
    model.load_adapter(str(folder / "checkpoint-9"), "default")
    model.load_adapter(str(folder / "checkpoint-3"), "default")
    model.save_pretrained(tmp_path)
    assert same(file(tmp_path), file(folder / "checkpoint-3"))


def test_a_checkpoint_that_does_not_say_what_was_trained_is_refused(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    copied = shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    state = json.loads((copied / "trainer_state.json").read_text())
    state["stateful_callbacks"].pop("paca_trained_columns")
    (copied / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="does not say which"):
        trainer(tmp_path).train(resume_from_checkpoint=str(copied))


def test_what_can_not_rotate_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="set rotate_every"):
        trainer(tmp_path, adapted(rotate_every=None))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments.fsdp = True
    with pytest.raises(ValueError, match="FSDP"):
        paca.RotateColumns().on_init_end(arguments, None, None, model=adapted())

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from paca.messages.errors import PacaError
from paca.training import load_run_config
from paca.training.config.adapter_settings import adapter_fields
from paca.training.config.early_checks import OWNED, paca_keys
from paca.training.config.key_checks import WORDS_OF_TRAIN
from paca.training.config.train_settings import keys_of, train_fields, training_arguments, with_defaults
from paca.training.trainers import TRAINERS


def defaults(has_eval: bool = True, context_length: int | None = 8192, **settings: object) -> dict[str, object]:
    with torch.device("meta"):
        if context_length is None:
            model = BloomForCausalLM(BloomConfig(n_layer=1))
        else:
            model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=context_length, num_hidden_layers=1))
    return with_defaults(settings, model, has_eval=has_eval)


def test_the_users_settings_win() -> None:
    resolved = defaults(learning_rate=0.5, save_strategy="no", warmup_steps=7, bf16=True)
    assert resolved["learning_rate"] == 0.5
    assert resolved["save_strategy"] == "no"
    assert resolved["warmup_steps"] == 7
    assert resolved["bf16"] is True


def test_keys_with_another_place_are_fields() -> None:
    assert OWNED.keys() <= train_fields().keys()


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("dataset_text_field=content", r"data\.columns: \{text: NAME\}"),
        ("dataset_kwargs={skip_prepare_dataset: true}", "nothing would be cut or packed"),
    ],
)
def test_how_trl_would_prepare_data_is_no_setting_of_a_run(config_file: Path, setting: str, instead: str) -> None:
    with pytest.raises(PacaError, match=instead):
        load_run_config(config_file, [f"train.{setting}"])


def test_what_is_refused_before_the_libraries_come_is_what_they_say() -> None:
    assert sorted(paca_keys()) == sorted(adapter_fields("paca", {}))
    for trainer in TRAINERS:
        assert not WORDS_OF_TRAIN.keys() & keys_of(trainer).keys()
    assert set(WORDS_OF_TRAIN.values()) <= keys_of("sft").keys()


def test_evaluation_is_planned_only_with_held_out_data() -> None:
    assert defaults(has_eval=True)["eval_strategy"] == "steps"
    assert defaults(has_eval=True)["eval_steps"] == 0.2
    without = defaults(has_eval=False)
    assert without["eval_strategy"] == "no"
    assert "eval_steps" not in without


def test_the_length_stays_within_the_models_context() -> None:
    assert defaults(context_length=128)["max_length"] == 128
    assert defaults(context_length=None)["max_length"] == 1024
    assert defaults(context_length=128, max_length=64)["max_length"] == 64


def test_tokens_are_counted_without_padding_where_there_is_any() -> None:
    assert defaults()["include_num_input_tokens_seen"] == "non_padding"
    assert defaults(packing=True)["include_num_input_tokens_seen"] == "all"


def test_either_name_of_checkpointing_reaches_the_trainer(tmp_path: Path) -> None:
    assert training_arguments(defaults(), tmp_path).gradient_checkpointing is False
    assert training_arguments(defaults(gradient_checkpointing=True), tmp_path).gradient_checkpointing is True
    if "activation_checkpointing" in train_fields():
        assert training_arguments(defaults(activation_checkpointing=True), tmp_path).gradient_checkpointing is True


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr.*: One of min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'num_decay_steps'.*lr_scheduler_kwargs, which is empty"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "linear.*'cycles'.*lr_scheduler_kwargs, which is {'cycles': 2}"),
        ({"optim_args": "rank=8, foo"}, "train.optim_args is 'rank=8, foo'; expected NAME=VALUE"),
    ],
)
def test_what_transformers_would_only_find_as_training_begins_is_refused_beforehand(
    tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    with pytest.raises(PacaError, match=why):
        training_arguments(defaults(**settings), tmp_path)


def test_a_schedule_may_have_settings_of_its_own(tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert training_arguments(defaults(**given), tmp_path).lr_scheduler_kwargs == {"min_lr_rate": 0.1}


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "epoch"}, {"eval_steps": 5}])
def test_keeping_the_best_model_needs_no_further_settings(tmp_path: Path, settings: dict[str, object]) -> None:
    config = training_arguments(defaults(load_best_model_at_end=True, **settings), tmp_path)
    assert isinstance(config, SFTConfig)
    assert config.save_strategy.value == config.eval_strategy.value


def test_settings_that_do_not_go_together_are_an_error_of_the_section(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"The section train does not work out: .*fp16 and bf16"):
        training_arguments(defaults(bf16=True, fp16=True), tmp_path)


@pytest.mark.parametrize(
    ("weights", "given", "autocast"),
    [
        (torch.float32, {}, "bf16"),
        (torch.bfloat16, {}, None),
        (torch.float16, {}, "fp16"),  # whose small gradients become zero unless losses are scaled
        (torch.float16, {"autocast_adapter_dtype": False}, None),  # torch scales for weights in float32 alone
        (torch.float16, {"bf16": True}, "bf16"),
        (torch.float32, {"fp16": True}, "fp16"),
        (torch.float32, {"use_cpu": True}, None),
        (torch.float16, {"trainer": "classification"}, None),
    ],
)
def test_autocast_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, weights: torch.dtype, given: dict[str, Any], autocast: str | None
) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)).to(weights)

    def chosen(method: str = "paca") -> str | None:
        found = with_defaults(given, model, has_eval=False, method=method)
        on = [name for name in ("bf16", "fp16") if found.get(name)]
        assert len(on) < 2
        return on[0] if on else None

    assert chosen() == (next(iter(given)) if set(given) & {"bf16", "fp16"} else None)  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native = [True, False]
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native[0]
    )
    assert chosen() == autocast
    if weights == torch.float16 and not given:
        assert chosen("full") is None
    native[0] = False  # as a T4 or V100
    assert chosen() == ("fp16" if weights == torch.float32 and not given else autocast)

"""Every method of PEFT that a run can train is planned."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import config
from peft import LoHaConfig, LoKrConfig, LoraConfig, PrefixTuningConfig, ShiraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from paca.planning import Setting, estimate
from paca.planning.setting import Answering
from paca.training.config import adapter_settings

SMALL: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "CPT": {"cpt_token_ids": [1, 2, 3]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 8},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 8},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    **{name: {"num_virtual_tokens": 4} for name in ("CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")},
}
NOT_ASKED = {*adapter_settings.NOT_HERE, "LORA", "PACA"}
METHODS = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - NOT_ASKED)
SETTING = Setting(32, 2)
SHAPE = config("llama", num_hidden_layers=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_a_run_can_train_is_planned(method: str) -> None:
    adapter = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](task_type="CAUSAL_LM", **SMALL.get(method, {}))
    assert estimate(SHAPE, SETTING, adapter).total > 0


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_a_layer_is_never_left_out_of_a_plan(kind: Any) -> None:
    first, second = (
        estimate(SHAPE, SETTING, kind(r=4, module_dropout=dropout, task_type="CAUSAL_LM"), timed=True)
        for dropout in (0.0, 0.9)
    )
    assert first.parts == second.parts
    assert first.operators == second.operators
    assert not any(operator.waits for operator in first.operators)  # the number is drawn on the host
    lora = estimate(SHAPE, SETTING, LoraConfig(r=4, task_type="CAUSAL_LM"), timed=True)
    assert first.flops > lora.flops  # the product of its factors is made whole


def test_dora_is_planned() -> None:
    plain, dora = (LoraConfig(r=4, use_dora=wanted, task_type="CAUSAL_LM") for wanted in (False, True))
    assert estimate(SHAPE, SETTING, dora).total > estimate(SHAPE, SETTING, plain).total


def test_shira_is_planned_with_and_without_its_choice_of_weights() -> None:
    random, unknown = (ShiraConfig(r=4, task_type="CAUSAL_LM") for _ in range(2))
    unknown.mask_fn = None  # as a run is outlined
    assert estimate(SHAPE, SETTING, random).parts == estimate(SHAPE, SETTING, unknown).parts


def test_answers_keep_the_keys_and_values_that_are_learned() -> None:
    setting = Setting(160, 1, trainer="grpo", answering=Answering(16, generation_batch_size=64))
    prefix = PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    plain, learned = (
        estimate(config("llama", num_hidden_layers=2), setting, adapter).parts["keys and values"]
        for adapter in (LoraConfig(r=4, task_type="CAUSAL_LM"), prefix)
    )
    assert learned / plain == (144 + 20) / 144  # tokens of a question, before it is answered

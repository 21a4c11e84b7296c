"""What a plan says the autograd graph holds, against what real forward passes make it hold."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, config
from quantized_checkpoint import quantized_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

import paca
from paca.bench.saved_activations import measure_saved_activations
from paca.lean import make_lean
from paca.lean.loss import loss_for
from paca.planning import Setting, estimate
from paca.training.context_tuning import train_on_context
from paca.training.starting_model import follow_trainer

PACA = paca.PacaConfig(r=8)
LORA = peft.LoraConfig(r=8, target_modules="all-linear")
TWO = {"num_hidden_layers": 2}
"""As many blocks as are run: that two and three tell of all, the tests with four show."""


def measured(setting: Setting, adapter: Any, shape: Any) -> int:
    """Bytes saved by a real forward pass."""
    torch.manual_seed(0)
    if setting.quantization is None:
        base = AutoModelForCausalLM.from_config(shape)
    else:
        base = quantized_model(shape, setting.quantization)
    base.train()
    if setting.lean:
        make_lean(base, recompute=setting.recompute)  # as in a run, before there is an adapter
    model = base if adapter is None else peft.get_peft_model(base, adapter)
    model.train()
    if setting.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    options = {}
    if setting.chunked_loss:
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        options = {"fused_lm_head": True}
        follow_trainer(model)  # as a run does
        train_on_context(SimpleNamespace(model=model, _get_num_items_in_batch=None))
    ids = torch.randint(1, 400, (setting.batch_size, setting.sequence_length))
    mask = torch.ones_like(ids)
    if setting.padded:
        mask[0, -3:] = 0

    def loss() -> torch.Tensor:
        autocast = torch.autocast("cpu", dtype=setting.autocast, enabled=setting.autocast is not None)
        with autocast, loss_for(ids.device):
            return model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False, **options).loss

    return measure_saved_activations(loss, model).bytes


def check(
    architecture: str,
    options: dict[str, Any] | None = None,
    adapter: Any = PACA,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> None:
    setting = Setting(sequence_length=96, batch_size=2, **settings)
    real = measured(setting, copy.deepcopy(adapter), config(architecture, dtype=dtype, **(options or {})))
    planned = estimate(config(architecture, dtype=dtype, **(options or {})), setting, adapter).activations
    print(f"{architecture} {settings}: planned {planned:,} measured {real:,} ratio {planned / real:.4f}")
    assert planned == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_activations_are_the_measured_ones(architecture: str) -> None:
    check(architecture, dtype=torch.bfloat16)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_of_lean_blocks_too(architecture: str) -> None:
    check(architecture, dtype=torch.bfloat16, lean=True, recompute="mlp", padded=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"lean": True},
        {"padded": True},
        {"checkpointing": True},
        {"chunked_loss": False},
        {"autocast": torch.bfloat16},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_of_other_ways_to_train_too(settings: dict[str, Any]) -> None:
    check("llama", TWO, **settings)


def _called(adapter: Any) -> str:
    return "full" if adapter is None else adapter.peft_type.value


PROMPTS = [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=64),
    peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(range(20))),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True),
    peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=20, adapter_layers=2),
]


@pytest.mark.parametrize("adapter", [LORA, None, *PROMPTS], ids=_called)
def test_of_other_methods_too(adapter: Any) -> None:
    check("llama", TWO, adapter=adapter, dtype=torch.bfloat16)


@pytest.mark.parametrize("adapter", [PACA, None], ids=_called)
def test_of_a_mixture_of_experts_too(adapter: Any) -> None:
    check("qwen3_moe", TWO, adapter=adapter)


LOOK_AT_VALUES = [
    peft.ShiraConfig(r=8, target_modules=["q_proj", "down_proj"], random_seed=0, task_type="CAUSAL_LM"),
    peft.VBLoRAConfig(r=4, vector_length=8, num_vectors=16, target_modules=["q_proj", "down_proj"]),
    peft.WaveFTConfig(n_frequency=64, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    peft.ShadowConfig(task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True, "chunked_loss": True}], ids=["as is", "saving"])
@pytest.mark.parametrize("adapter", LOOK_AT_VALUES, ids=lambda adapter: adapter.peft_type.value)
def test_of_methods_that_look_at_values_too(adapter: Any, settings: dict[str, Any]) -> None:
    check("llama", TWO, adapter=adapter, dtype=torch.bfloat16, **settings)


@pytest.mark.parametrize(
    "adapter",
    [
        peft.ShiraConfig(r=8, target_modules=["q_proj", "down_proj"], random_seed=0, task_type="CAUSAL_LM"),
        peft.HiraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        peft.LoraConfig(r=8, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["SHiRA", "HiRA", "DoRA"],
)
def test_of_methods_that_unpack_weights_of_four_bits_too(adapter: Any) -> None:
    pytest.importorskip("bitsandbytes")
    check("llama", TWO, adapter=adapter, dtype=torch.bfloat16, quantization="nf4")


@pytest.mark.parametrize(
    ("architecture", "options", "settings"),
    [
        ("llama", {"shadow_num_hidden_layers": 3}, {"lean": True}),
        ("bloom", {}, {}),
        ("llama", {"auxiliary_loss_weight": 0.0}, {}),
    ],
    ids=["three blocks", "tuples", "no loss of its own"],
)
def test_of_every_shadow_too(architecture: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    adapter = peft.ShadowConfig(task_type="CAUSAL_LM", **options)
    check(architecture, adapter=adapter, dtype=torch.bfloat16, **settings)


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "bloom"])
def test_of_learned_prompts_in_other_architectures_too(architecture: str) -> None:
    check(architecture, adapter=PROMPTS[0], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("architecture", "quantization", "settings", "adapter"),
    [
        ("llama", "nf4", {}, PACA),
        ("llama", "nf4", {"lean": True, "recompute": "mlp", "padded": True}, PACA),
        ("gpt2", "nf4", {}, PACA),
        ("llama", "int8", {}, PACA),
        ("llama", "nf4", {}, LORA),
        ("llama", "nf4", {}, paca.PacaConfig(r=8, target_modules=["q_proj", "up_proj"])),  # some layers as in stock
    ],
    ids=["nf4", "nf4, lean", "nf4, Conv1D", "int8", "nf4, lora", "nf4, some layers"],
)
def test_of_quantized_weights_too(architecture: str, quantization: str, settings: dict[str, Any], adapter: Any) -> None:
    pytest.importorskip("bitsandbytes")
    check(architecture, adapter=adapter, dtype=torch.bfloat16, quantization=quantization, **settings)


def test_frozen_blocks_keep_nothing_below_the_first_adapter_and_something_above() -> None:
    check("llama", {"num_hidden_layers": 7}, adapter=paca.PacaConfig(r=8, layers_to_transform=[3]))

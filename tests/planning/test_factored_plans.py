"""What a plan counts of a run whose optimizer steps factors of the deltas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import config

import paca
from factored_deltas import adapted, trained
from paca.planning import Setting, estimate
from paca.planning.optimizer_state import step_temporaries
from paca.planning.step_trace import GRADIENTS

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FEATURES = (64, 32, 32, 64, 96, 96, 64)
"""Outputs of a block's layers: two heads of keys and values."""


def planned(optimizer: str, device: Any, **settings: Any) -> Any:
    shape = config("llama", **SHAPE, num_key_value_heads=2, vocab_size=64, dtype=torch.float32)
    setting = Setting(batch_size=2, sequence_length=16, optimizer=optimizer, device=device, **settings)
    return estimate(shape, setting, paca.PacaConfig(r=32), timed=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_those_of_the_factors(device: str) -> None:
    plan = planned("factored_adamw_4", device, gradient_accumulation=2)
    assert plan.parts[GRADIENTS] == 2 * sum(4 * 4 * (out + 32) for out in FEATURES)
    other = planned("adamw_torch_fused", device, gradient_accumulation=2)
    assert other.parts[GRADIENTS] == 2 * sum(4 * 32 * out for out in FEATURES)
    assert plan.flops < other.flops


def test_several_processes_have_gradients_of_whole_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = planned("factored_adamw_4", "cpu", gradient_accumulation=2)
    assert plan.parts[GRADIENTS] == 2 * sum(4 * 32 * out for out in FEATURES)


def test_a_step_makes_gradients_of_factors_where_backward_passes_make_the_deltas() -> None:
    deltas = trained(adapted())
    made_in_the_step = step_temporaries("factored_adamw_3", "cpu", deltas)
    optimizer = paca.FactoredAdamW(deltas, rank=3)
    factors = sum(8 * 3 * sum(delta.shape) for delta in deltas)
    assert step_temporaries("factored_adamw_3", "cpu", deltas) == made_in_the_step - factors
    assert optimizer.state

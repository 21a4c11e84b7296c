"""PaCA on Falcon, whose linear layers are a class of its own: they compute as they do without it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

import paca
from models import adapt, base_state, tokens
from paca.layers import paca_layers

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def falcon(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return FalconForCausalLM(FalconConfig(**SIZES, bias=True, parallel_attn=False)).to(dtype).eval()


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_trains_and_is_put_back_as_other_layers_are(dtype: torch.dtype) -> None:
    base = falcon(dtype)
    want, kinds = logits(base).detach(), [type(module) for module in base.modules()]
    model = adapt(base, task_type="CAUSAL_LM", init_weights=True, selection="weight_norm")
    assert len(paca_layers(model)) == 8
    assert torch.equal(logits(model), want)  # rounded before the bias is added, as without columns
    originals = base_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = logits(model)
        assert not torch.equal(trained, want)
        assert torch.equal(logits(pickle.loads(pickle.dumps(model))), trained)
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(logits(merged), trained)
        assert [type(module) for module in merged.modules()] == kinds
        for name, value in base_state(model).items():
            assert torch.equal(value, originals[name])
        assert torch.equal(logits(model.unload()), want)
    assert [type(module) for module in base.modules()] == kinds


def test_gradients_are_those_of_the_whole_weights() -> None:
    model = adapt(falcon(torch.float64), task_type="CAUSAL_LM")
    twin = copy.deepcopy(model).merge_and_unload()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    for each in (model, twin):
        each(input_ids=tokens(), labels=tokens()).loss.backward()
    dense = dict(twin.named_parameters())
    for name, layer in model.named_modules():
        if isinstance(layer, paca.layers.PacaLayer):
            whole = dense[f"{name.removeprefix('base_model.model.')}.weight"].grad
            expected = layer.scaling["default"] * whole[:, layer.paca_indices["default"]]
            torch.testing.assert_close(layer.paca_delta["default"].grad, expected, rtol=1e-9, atol=1e-14)

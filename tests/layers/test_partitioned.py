"""What DeepSpeed's ZeRO-3 takes apart, as far as it shows without DeepSpeed; `distributed/launches.py` runs it."""

from __future__ import annotations

import pytest
import torch

import paca.layers.modes
import paca.tuner.model
from models import adapt, adapted_perceptron, llama
from paca.layers import paca_layers


def tell(patch, enabled):
    for module in (paca.layers.modes, paca.tuner.model):
        patch.setattr(module, "is_deepspeed_zero3_enabled", lambda: enabled)


@pytest.fixture
def enabled(monkeypatch):
    tell(monkeypatch, True)


def test_columns_are_added_where_weights_are_taken_apart(enabled):
    model = adapted_perceptron(dtype=torch.float64)
    assert [layer.mode for layer in paca_layers(model)] == ["additive", "additive"]
    x = torch.randn(4, 7, dtype=torch.float64)
    model(x).square().sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        tell(patch, False)
        plain = adapted_perceptron(dtype=torch.float64)
    plain(x).square().sum().backward()
    for one, other in zip(paca_layers(model), paca_layers(plain), strict=True):
        assert other.mode == "resident"
        torch.testing.assert_close(one.paca_delta["default"].grad, other.paca_delta["default"].grad)


def test_a_weight_that_is_apart_already_is_known_by_its_mark():
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.ds_id = 0
    modes = [layer.mode for layer in paca_layers(adapt(model, target_modules=["q_proj"]))]
    assert modes == ["additive", "resident"]


def test_other_layers_are_refused_by_name(enabled):
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding, and under DeepSpeed's ZeRO-3 only linear"):
        adapt(llama(), target_modules=["embed_tokens"])


def test_weights_that_are_taken_apart_after_columns_were_put_in_are_refused():
    model = adapted_perceptron()
    for layer in paca_layers(model):
        layer.base_layer.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="ZeRO-3 took weights apart that PaCA keeps columns in"):
        model(torch.randn(2, 7))

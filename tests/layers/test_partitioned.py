"""What DeepSpeed's ZeRO-3 takes apart, as far as it shows without DeepSpeed; `distributed/launches.py` runs it."""

from __future__ import annotations

import pytest
import torch

import paca.layers.modes
import paca.tuner.model
from models import adapt, adapted_perceptron, llama, perceptron
from paca.layers import paca_layers
from quantized_layers import quantized_linear


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


@pytest.mark.parametrize("mode", ["additive", "patched"])
def test_a_delta_is_asked_for_in_its_layers_pass_alone(mode, enabled):
    """ZeRO-3 gathers a parameter that is asked for in a pass, and from then on in every pass of the module that ran."""
    model = perceptron()
    if mode == "patched":
        model.lin1, model.lin2 = quantized_linear("int8", model.lin1), quantized_linear("int8", model.lin2)
    model = adapt(model, target_modules=["lin1", "lin2"])
    assert [layer.mode for layer in paca_layers(model)] == [mode, mode]
    running, asked = [], []

    class Parameters(dict):
        def __getitem__(self, name):
            asked.extend(running[-1:])
            return super().__getitem__(name)

    def leave(*_):
        running.pop()

    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: running.append(module), prepend=True)
        module.register_forward_hook(leave)
    for layer in paca_layers(model):
        layer.paca_delta._parameters = Parameters(layer.paca_delta._parameters)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        model(torch.randn(2, 7)).square().sum().backward()
        optimizer.step()
    assert asked == [layer.base_layer for layer in paca_layers(model)] * 2


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


def test_symbolic_tracing_is_refused_by_its_name() -> None:
    """Its stand-ins for values have every attribute, also those that DeepSpeed sets."""
    base = adapted_perceptron().get_base_model()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^torch\.fx\.symbolic_trace runs a model without values"):
        torch.fx.symbolic_trace(base)

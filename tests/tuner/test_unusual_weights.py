"""Weights that are no plain memory of their own: expanded ones, views, inference tensors, other strides."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import paca
from models import adapt
from paca.layers import paca_layers

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def layer_with(weight):
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer, nn.Linear(6, 4))


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


WORK = {
    "transposed": lambda: random(8, 6).T,
    "a view of rows": lambda: random(10, 8)[2:8],
    "a view of columns": lambda: random(6, 12)[:, 3:11],
    "every second column": lambda: random(6, 16)[:, ::2],
}


@pytest.mark.parametrize("kind", WORK)
def test_views_and_other_strides_are_adapted_and_restored_bit_for_bit(kind):
    weight = WORK[kind]()
    memory = weight._base if weight._base is not None else weight
    before, original = memory.clone(), weight.clone()
    model = adapt(layer_with(weight), target_modules=["0"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (layer,) = paca_layers(model)
    want = original.clone()
    want[:, layer.paca_indices["default"]] += layer.scaling["default"] * layer.paca_delta["default"].detach()
    torch.testing.assert_close(layer.base_layer.weight, nn.Parameter(want, False))
    model.unload()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("shape", [(1, 8), (6, 1)], ids=["rows", "columns"])
def test_a_weight_that_is_the_same_memory_many_times_is_refused(shape):
    model = layer_with(random(*shape).expand(6, 8))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"several values.*same memory.*clone\(\)"):
        adapt(model, target_modules=["0"])
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)


def test_weights_that_overlap_in_memory_are_refused():
    memory = random(10, 8)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 6))
    for layer, start in zip(model, (0, 3), strict=True):
        layer.weight = nn.Parameter(memory[start : start + 6], requires_grad=False)
    with pytest.raises(ValueError, match="shares"):
        adapt(model, target_modules=["0"])


def test_inference_tensors_are_adapted_for_inference():
    with torch.inference_mode():
        model = layer_with(random(6, 8))
        original = model[0].weight.clone()
    model = adapt(model, target_modules=["0"]).eval()
    with torch.inference_mode():
        (layer,) = paca_layers(model)
        y = model(X)
        want = original.clone()
        want[:, layer.paca_indices["default"]] += layer.scaling["default"] * layer.paca_delta["default"]
        torch.testing.assert_close(
            y, model.get_base_model()[1](torch.nn.functional.linear(X, want, layer.base_layer.bias))
        )
        model.unload()
        assert torch.equal(model.get_base_model()[0].weight, original)


@pytest.mark.parametrize("r", [2, 8])
def test_inference_tensors_may_be_in_a_state_dict(r):
    with torch.inference_mode():
        model = adapt(layer_with(random(6, 8)), r=r, target_modules=["0"], init_weights=False)
        original, y = random(6, 8), model(X)
        held = model.state_dict()
        for _ in range(2):
            assert torch.equal(model(X), y)
        assert torch.equal(held["base_model.model.0.base_layer.weight"], original)
        model.unload()
        assert torch.equal(model.get_base_model()[0].weight, original)


def test_a_cast_through_data_casts_the_originals_too():
    model = adapt(layer_with(random(6, 8)), r=4, target_modules=["0"], init_weights=True)
    model.add_adapter("other", paca.PacaConfig(r=4, target_modules=["0"], random_seed=1))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    optimizer, x = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3), X.bfloat16()
    for _ in range(3):
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model(x)
    model.set_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), y)
    model.unload()
    assert torch.equal(model.get_base_model()[0].weight, random(6, 8).bfloat16())


def test_a_state_dict_of_weights_in_one_memory_keeps_their_values():
    model = layer_with(random(6, 8))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    originals = [layer.weight.clone() for layer in model]
    model = adapt(model, r=4, target_modules=["0", "1"], init_weights=False)
    held = {name: value.detach() for name, value in model.state_dict().items()}
    model(X)
    for number, original in enumerate(originals):
        assert torch.equal(held[f"base_model.model.{number}.base_layer.weight"], original)


class Copied(nn.Module):
    def forward(self, weight):
        return weight.clone()


@pytest.mark.parametrize("compute", [
    lambda layer: parametrize.register_parametrization(layer, "weight", Copied()),
    parametrizations.weight_norm,
    lambda layer: prune.random_unstructured(layer, "weight", 0.5),
])  # fmt: skip
@pytest.mark.parametrize("active", [True, False])
def test_a_weight_that_is_computed_at_each_use_is_refused_by_name(compute, active):
    model = adapt(layer_with(random(6, 8)), target_modules=["0"])
    (layer,) = paca_layers(model)

    def use():
        with nullcontext() if active else model.disable_adapter():
            compute(layer.base_layer)
        with torch.no_grad():
            layer.paca_delta["default"].add_(1)
        model(X)

    with pytest.raises(RuntimeError, match=r"adapted by 'default' is computed anew at each use .*parametrize"):
        use()


def test_a_computed_weight_that_is_a_parameter_again_works():
    model = adapt(layer_with(random(6, 8)), target_modules=["0"])
    before, (layer,) = model(X), paca_layers(model)
    parametrize.register_parametrization(layer.base_layer, "weight", Copied())
    with pytest.raises(RuntimeError, match="computed anew"):
        model(X)
    parametrize.remove_parametrizations(layer.base_layer, "weight")
    layer.base_layer.weight.requires_grad_(False)
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("compute", [
    lambda deltas: parametrize.register_parametrization(deltas, "default", Copied()),
    lambda deltas: prune.random_unstructured(deltas, "default", 0.5),
])  # fmt: skip
def test_deltas_that_are_computed_at_each_use_are_refused_until_they_are_parameters_again(compute):
    model = adapt(layer_with(random(6, 8)), target_modules=["0"])
    (layer,) = paca_layers(model)
    with torch.no_grad():
        layer.paca_delta["default"].normal_()
    compute(layer.paca_delta)
    with pytest.raises(RuntimeError, match=r"adapter 'default' are computed anew at each use .*paca_delta"):
        model(X)
    if parametrize.is_parametrized(layer.paca_delta):
        parametrize.remove_parametrizations(layer.paca_delta, "default")
    else:
        prune.remove(layer.paca_delta, "default")
    delta, indices = layer.paca_delta["default"], layer.paca_indices["default"]
    expected = random(6, 8).index_add_(1, indices, layer.scaling["default"] * delta.detach())
    expected = model.base_model.model[1](X @ expected.T + layer.base_layer.bias)
    torch.testing.assert_close(model(X), expected)


def test_a_weight_that_is_quantized_under_an_adapter_is_refused_by_name():
    torchao = pytest.importorskip("torchao.quantization")
    model = adapt(nn.Sequential(nn.Linear(64, 64)), r=16, target_modules=["0"])
    x = torch.randn(2, 64)
    model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(RuntimeError, match="replaced by a Int8Tensor, as torchao"):
        model(x)


def test_a_layer_that_is_replaced_under_an_adapter_is_refused_by_name():
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import quantize_

    model = adapt(nn.Sequential(nn.Linear(32, 32)), r=16, target_modules=["0"], init_weights=False)
    x, before = torch.randn(2, 32), model.get_base_model()[0].base_layer
    y = model(x)
    fake = qat.IntxFakeQuantizeConfig(torch.int4, group_size=16)
    with pytest.raises(RuntimeError, match=r"can't be replaced by a FakeQuantizedLinear.*first and adapt it then"):
        quantize_(model, qat.QATConfig(weight_config=fake, step="prepare"))
    assert model.get_base_model()[0].base_layer is before
    assert torch.equal(model(x), y)


def test_a_merged_weight_may_be_quantized():
    torchao = pytest.importorskip("torchao.quantization")
    model = adapt(nn.Sequential(nn.Linear(64, 64)), r=16, target_modules=["0"], init_weights=False)
    x = torch.randn(2, 64)
    wanted = model(x)
    model.merge_adapter()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert torch.allclose(model(x), wanted, atol=0.05)

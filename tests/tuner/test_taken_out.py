"""A library that takes adapted layers out by hand, as diffusers' `unload_lora_weights` does."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca import PacaConfig
from paca.layers import PacaLayer, paca_layers
from quantized_layers import stack


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(32, 32), Conv1D(32, 32), nn.Linear(32, 32)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.embed(ids).mT).mT
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


IDS = torch.arange(8)[None]


def _adapted() -> tuple[Any, dict[str, Tensor], Tensor]:
    """An adapted model whose deltas are not zero, the tensors it had before, and what it gave."""
    torch.manual_seed(0)
    model = _Net()
    before, output = copy.deepcopy(model.state_dict()), model(IDS).detach()
    config = PacaConfig(r=4, target_modules=r"embed|mix|blocks\.\d+", init_weights=False)
    return inject_adapter_in_model(config, model), before, output


def _take_out(model: nn.Module, keep: str = "") -> None:
    """What libraries do that know nothing but `BaseTunerLayer`."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and name != keep:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if not keep:
        del model.peft_config


def _assert_stock(model: nn.Module, before: dict[str, Tensor], output: Tensor) -> None:
    assert torch.equal(model(IDS), output)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert {type(m) for m in model.modules()} <= {_Net, nn.Embedding, nn.Conv1d, nn.ModuleList, nn.Linear, Conv1D}


def test_layers_taken_out_by_hand_are_the_stock_ones_again() -> None:
    model, before, output = _adapted()
    assert not torch.allclose(model(IDS), output)
    _take_out(model)
    _assert_stock(model, before, output)
    _assert_stock(copy.deepcopy(model), before, output)
    again = inject_adapter_in_model(PacaConfig(r=4, target_modules=["mix"], init_weights=False), model)
    assert not torch.allclose(again(IDS), output)


def test_a_layer_that_stays_is_trained_on() -> None:
    model, before, output = _adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS).square().sum().backward()
    _take_out(model, keep="blocks.2")
    optimizer.step()  # it still holds the deltas of the layers that went
    [layer] = paca_layers(model)
    weight = before["blocks.2.weight"].index_add(
        1, layer.paca_indices["default"], layer.paca_delta["default"].detach() * layer.scaling["default"]
    )
    reference = _Net()
    reference.load_state_dict({**before, "blocks.2.weight": weight})
    assert torch.allclose(model(IDS), reference(IDS), atol=1e-6)
    _take_out(model)
    _assert_stock(model, before, output)


def test_a_merged_layer_keeps_what_is_merged() -> None:
    model, _, _ = _adapted()
    wanted = model(IDS).detach()
    for layer in paca_layers(model):
        layer.merge()
    _take_out(model)
    assert torch.equal(model(IDS), wanted)
    assert not any(isinstance(m, PacaLayer) for m in model.modules())


def test_a_pending_backward_pass_of_a_layer_taken_out_raises() -> None:
    model, _, _ = _adapted()
    pending = model(IDS).sum()
    _take_out(model)
    gc.collect()
    with pytest.raises(RuntimeError, match="adapter unloaded"):
        pending.backward()


@pytest.mark.parametrize("kind", ["int8", "torchao-int8"])
def test_a_quantized_layer_taken_out_is_the_stock_one_again(kind: str) -> None:
    model, x = stack(kind), torch.randn(2, 64, dtype=torch.bfloat16)
    output, stock = model(x), {name: type(module) for name, module in model.named_modules()}
    inject_adapter_in_model(PacaConfig(r=16, target_modules=["lin1", "lin2"], init_weights=False), model)
    assert not torch.allclose(model(x), output)
    _take_out(model)
    assert torch.equal(model(x), output)
    assert {name: type(module) for name, module in model.named_modules()} == stock


def test_a_base_layer_put_elsewhere_stays_adapted() -> None:
    model, _, output = _adapted()
    holder = nn.Module()
    holder.first = model.blocks[0].base_layer
    assert not torch.allclose(model(IDS), output)
    assert holder.first is paca_layers(model)[2].base_layer
    assert hasattr(holder.first, "columns")

"""The default of all linear layers: those that are called as a product are adapted, and no others."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import paca
from models import adapt, llama
from paca.layers import paca_layers


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_last_layer_of_torchs_attention_is_left_out() -> None:
    """It is a linear layer by its class, whose weight alone is used."""
    model = adapt(Pooled())
    assert [name for name, _ in model.named_parameters() if "paca_delta" in name] == [
        "base_model.model.first.paca_delta.default"
    ]
    model(torch.randn(2, 3, 8)).sum().backward()
    assert paca_layers(model)[0].paca_delta["default"].grad.abs().sum() > 0


def test_named_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention.out_proj is a .*NonDynamicallyQuantizableLinear"):
        adapt(Pooled(), target_modules=["first", "out_proj"])


class Narrow(nn.Module):
    """As Gemma 3n has four inputs to some layers of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.middle = nn.Linear(64, 64), nn.Linear(4, 64), nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) + self.narrow(x[..., :4]) + self.middle(x[..., :16])


def test_small_layers_with_fewer_inputs_than_columns_are_left_out_and_told() -> None:
    with pytest.warns(UserWarning, match=r"leaves out 1 layers with fewer inputs than r: narrow\. .* rank_pattern"):
        model = adapt(Narrow(), r=8)
    assert [layer.in_features for layer in paca_layers(model)] == [64, 16]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(Narrow(), r=8, rank_pattern={"narrow": 2})
        assert [layer.in_features for layer in paca_layers(model)] == [64, 4, 16]
        assert len(paca_layers(adapt(Narrow(), r=4))) == 3
        assert len(paca_layers(adapt(Narrow(), r=8, target_modules="all-linear", indices={"narrow": [0, 3]}))) == 3
        for names in ("nar.*", ["narrow"]):  # nobody wants to know how these are trained
            assert len(paca_layers(adapt(Narrow(), r=8, target_modules="all-linear", exclude_modules=names))) == 2
    with pytest.raises(ValueError, match=r"middle: r=17 columns .* leave it out through exclude_modules"):
        adapt(Narrow(), r=17)  # it is not small
    with pytest.raises(ValueError, match="narrow: r=8 columns were asked for"):
        adapt(Narrow(), r=8, target_modules=["narrow"])
    with pytest.raises(ValueError, match="r=999 columns were asked for"):
        adapt(llama(), r=999)


def test_the_data_room_is_there_with_the_package() -> None:
    assert callable(paca.data.load_examples)

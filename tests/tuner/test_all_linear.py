"""The default of all linear layers: those that are called as a product are adapted, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import adapt
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

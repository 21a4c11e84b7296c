"""PaCA for linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from paca.functional.linear import LinearProduct
from paca.layers.base import PacaLayer
from paca.layers.resident_weight import ResidentWeight


class ResidentLinear(ResidentWeight, nn.Linear):
    """An `nn.Linear` with resident columns `weight[:, indices]`."""

    stock_class = nn.Linear
    input_dim = 1
    fixed_product = LinearProduct(1)


class ResidentConv1D(ResidentWeight, Conv1D):
    """A transformers `Conv1D` (GPT-2), whose weight is `(in_features, out_features)`: columns are its rows."""

    stock_class = Conv1D
    input_dim = 0
    fixed_product = LinearProduct(0)


class PacaLinear(PacaLayer):
    """The adapted layer: keeps each adapter's deltas and indices, and runs the base layer, which holds them."""

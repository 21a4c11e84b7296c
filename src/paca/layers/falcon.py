"""PaCA for Falcon's own linear layers; imported where a model has them."""

from __future__ import annotations

from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconLinear

from paca.functional.linear import LinearProduct
from paca.layers.resident_weight import ResidentWeight


class FalconProduct(LinearProduct):
    """It rounds once more before the bias is added, as Falcon was trained."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.T
        return y if bias is None else y + bias


class ResidentFalconLinear(ResidentWeight, FalconLinear):
    """A `FalconLinear` with resident columns `weight[:, indices]`."""

    stock_class = FalconLinear
    input_dim = 1
    fixed_product = FalconProduct(1)

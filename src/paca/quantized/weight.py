"""What PaCA needs of a quantized weight that dequantizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class QuantizedWeight(ABC):
    """One way to quantize the weight of a linear layer. Holds nothing itself: every method takes the layer."""

    library: str
    """The package that it comes from."""
    layer_class: str
    """The name of its class of layers there, if these are known by their class."""
    stock_dequantizes = True
    """Whether the stock layer's product is that with the dequantized weight, bit for bit."""

    def matches(self, module: nn.Module) -> bool:
        """Whether `module`'s weight is quantized this way. Imports nothing."""
        return any(c.__name__ == self.layer_class and comes_from(c, self.library) for c in type(module).__mro__)

    @abstractmethod
    def name(self, module: Any) -> str:
        """What an adapter records as the quantization of its base, such as `"nf4"`."""

    @abstractmethod
    def stored_dtype(self, module: Any) -> torch.dtype:
        """The type that the weight dequantizes to by itself."""

    @abstractmethod
    def dequantize(self, module: Any) -> Tensor:
        """A new `(out_features, in_features)` in `stored_dtype`."""

    @abstractmethod
    def replace(self, module: Any, weight: Tensor) -> Any:
        """Quantize `weight (out_features, in_features)` in place of the present one. Gives what `restore` needs to
        bring that back, bit for bit."""

    @abstractmethod
    def restore(self, module: Any, kept: Any) -> None:
        """Undo `replace`."""

    def adopt(self, module: Any) -> None:  # noqa: B027
        """Get `module` ready for being dequantized at any time."""

    def release(self, module: Any) -> None:  # noqa: B027
        """Undo `adopt`."""

    def packed(self, module: Any) -> Tensor:
        """The tensor that holds the codes: it is replaced, or its version moves, when the weight does."""
        return module.weight

    def problem(self, module: Any) -> str | None:
        """Why this layer can't be adapted all the same, or None."""
        return None

    def shape(self, module: Any) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return module.out_features, module.in_features

    def dtypes(self, module: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The types of the matmul and of the result for an input `x`."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            return dtype, dtype
        return x.dtype, x.dtype

    def weight(self, module: Any, dtype: torch.dtype) -> Tensor:
        """Dequantize for a matmul in `dtype`: a new `(out_features, in_features)`."""
        return self.dequantize(module).to(dtype)

    def weight_and_columns(self, module: Any, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its columns `(out_features, k)` at `positions (k,)` before they were rounded to `dtype`."""
        weight = self.dequantize(module)
        return weight.to(dtype), weight.index_select(1, positions)

    def plain(self, module: Any, weight: Tensor) -> nn.Linear:
        """An ordinary layer with `weight (out_features, in_features)` and `module`'s bias."""
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return linear.train(module.training)


def comes_from(kind: type, package: str) -> bool:
    """Whether a class is defined in `package`, or in a part of it."""
    return f"{kind.__module__}.".startswith(f"{package}.")

"""Small quantized layers and models: made by the real libraries, or fakes of those that need a GPU."""

from __future__ import annotations

import copyreg
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REAL = ("nf4", "nf4-double", "fp4", "int8", "torchao-int8", "torchao-int8-group", "torchao-int4", "hqq")


def quantized_linear(kind: str, linear: nn.Linear) -> nn.Module:
    """`linear` quantized for real; skips the test if the library is missing."""
    linear.requires_grad_(False)
    if kind.startswith("torchao"):
        return _torchao(kind, linear)
    if kind == "hqq":
        return _hqq(linear)
    bnb: Any = pytest.importorskip("bitsandbytes")
    has_bias = linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        double, quant_type = kind.endswith("double"), kind[:3]
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=has_bias, compress_statistics=double, quant_type=quant_type
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(),
            requires_grad=False,
            compress_statistics=double,
            quant_type=quant_type,
            module=layer,
        )
    layer.bias = linear.bias
    layer.requires_grad_(False)
    return layer.to("cpu")  # the move quantizes


def _torchao(kind: str, linear: nn.Linear) -> nn.Module:
    ao: Any = pytest.importorskip("torchao.quantization")
    if kind == "torchao-int8":
        config = ao.Int8WeightOnlyConfig()
    elif kind == "torchao-int8-group":
        config = ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16))
    else:
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16))
    holder = nn.Sequential(linear)
    ao.quantize_(holder, config)
    return holder[0]


def _hqq(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hqq: Any = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
    return hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


class Stack(nn.Module):
    """`lin1`, tanh, `lin2`; sizes that every library takes, 64 → 128 → 64."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(64, 128)
        self.lin2 = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.tanh(self.lin1(x)))


def stack(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Any:
    """A `Stack` with both layers quantized."""
    torch.manual_seed(seed)
    model = Stack().to(dtype)
    for name in ("lin1", "lin2"):
        setattr(model, name, quantized_linear(kind, getattr(model, name)))
    return model


class _Codes(torch.autograd.Function):
    """Multiplies with int8 codes, as the kernels do that never make a float weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.codes, ctx.scales = codes, scales
        return (x @ codes.to(x.dtype).t()) * scales.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.scales.to(grad.dtype)) @ ctx.codes.to(grad.dtype), None, None


class ForwardOnlyLinear(nn.Module):
    """What GPTQ, AWQ, EETQ and AQLM layers have in common: codes as buffers, sizes by name, no float weight."""

    def __init__(self, linear: nn.Linear, trainable: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach().clone())
        self.trainable = trainable

    def forward(self, x: Tensor) -> Tensor:
        if not self.trainable:
            with torch.no_grad():
                return _Codes.apply(x, self.qweight, self.scales) + self.bias.to(x.dtype)
        return _Codes.apply(x, self.qweight, self.scales) + self.bias.to(x.dtype)

    def dequantized(self) -> Tensor:
        return self.qweight.double() * self.scales.double()[:, None]


class _StandIn(type):
    """The type of the classes that `stand_in` makes, by which they are pickled."""


@cache
def stand_in(package: str) -> type[ForwardOnlyLinear]:
    """A class of layers that pretends to come from `package`."""
    return _StandIn("QuantLinear", (ForwardOnlyLinear,), {"__module__": package})


copyreg.pickle(_StandIn, lambda kind: (stand_in, (kind.__module__,)))  # type: ignore[arg-type]


def forward_only_stack(package: str, trainable: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """A `Stack` of layers whose class pretends to come from `package`."""
    torch.manual_seed(0)
    kind = stand_in(package)
    model = Stack()
    for name in ("lin1", "lin2"):
        setattr(model, name, kind(getattr(model, name), trainable))
    return model.to(dtype)

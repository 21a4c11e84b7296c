"""Quantizing with bitsandbytes: a checkpoint as it is loaded, a layer, a model without weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paca.messages.errors import PacaError
from paca.messages.install import how_to_install

QUANTIZATIONS = ("nf4", "fp4", "int8")
META = torch.device("meta")


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The settings of one of `QUANTIZATIONS`, for matmuls in `compute_dtype`; those in 4 bits quantize twice."""
    if quantization not in QUANTIZATIONS:
        raise PacaError(f"Unknown quantization {quantization!r}. Give one of: {', '.join(QUANTIZATIONS)}.")
    require_bitsandbytes(quantization)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_not_quantized(config: PreTrainedConfig, name: str, quantization: str) -> None:
    """Raise PacaError if a checkpoint is quantized already; `name`, with a space before it, is for the message."""
    method = method_of(config)
    if method is not None:
        raise PacaError(
            f"The checkpoint{name} is quantized already ({method}), so it can't be quantized to {quantization}. "
            "Leave the quantization out, or give the original checkpoint."
        )


def method_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint is quantized, by transformers' name for it; None if it is not."""
    found: Any = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
    return None if method is None else str(getattr(method, "value", method))


def require_bitsandbytes(what: str) -> None:
    """Raise PacaError if bitsandbytes is not installed, by which `what` is to be quantized."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PacaError(f"{what}: quantized weights need bitsandbytes. {how_to_install('bitsandbytes')}")


def quantized_linear(linear: Any, quantization: str) -> nn.Module:
    """A layer of bitsandbytes with the weight of `linear`, an `nn.Linear`, on its device.

    `quantization` is `"int8"`, or `"nf4"` or `"fp4"`, which may have `" without double quantization"` behind it.
    """
    from bitsandbytes import nn as bnb

    weight, bias = linear.weight, linear.bias
    sizes = (linear.in_features, linear.out_features, bias is not None)
    layer: Any
    if quantization == "int8":
        layer = bnb.Linear8bitLt(*sizes, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        kind, _, once = quantization.partition(" without ")
        options: Any = {"compress_statistics": not once, "quant_type": kind}
        layer = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, device="meta", **options)
        layer.weight = bnb.Params4bit(weight.data, requires_grad=False, module=layer, **options)
    if bias is not None:
        layer.bias = nn.Parameter(bias.data, requires_grad=False)
    return layer.to(weight.device)  # the move quantizes


def device_map() -> dict[str, torch.device | str]:
    """Everything on this process's device: quantized weights can't be moved freely later."""
    if not torch.accelerator.is_available():
        return {"": "cpu"}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return {"": torch.device(kind.type, torch.accelerator.current_device_index())}


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model was quantized, now or by the checkpoint."""
    return bool(getattr(model, "is_quantized", False))


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in the form that a backward pass can read.

    For inference on CPUs with AVX512-BF16, bitsandbytes repacks them into another one: the first evaluation of a run
    would be the end of its training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def unmap(model: nn.Module) -> None:
    """Copy what was not quantized out of the checkpoint's file: a view of it keeps all of the file in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def quantize_outline(model: PreTrainedModel, quantization: str | None) -> PreTrainedModel:
    """Put quantized layers into `model`, without adapters and on the meta device, in place.

    transformers chooses the layers and bitsandbytes quantizes them, as when a checkpoint is loaded. On the meta device
    that gives every code and scale its shape and dtype, and no value. Without `quantization` it is what the model's
    configuration says of its checkpoint, which may be nothing.

    Raises:
        PacaError: Bitsandbytes is missing, or the checkpoint is quantized in another way.
    """
    settings = _settings(model, quantization)
    if settings is None:
        return model
    require_bitsandbytes(quantization or "the checkpoint")
    import bitsandbytes
    from transformers.quantizers.auto import AutoHfQuantizer

    # bitsandbytes keeps its table of codes where it first needs one: not on the meta device.
    bitsandbytes.functional.quantize_blockwise(torch.zeros(1))
    dtypes = {name: module.weight.dtype for name, module in model.named_modules() if _is_linear(module)}
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": META})
    for name, module in model.named_modules():
        dtype = dtypes.get(name)
        if dtype is not None and not _is_linear(module):
            _quantize(module, dtype)
    quantizer.postprocess_model(model)
    return model


def _settings(model: PreTrainedModel, quantization: str | None) -> BitsAndBytesConfig | None:
    if quantization is not None:
        check_not_quantized(model.config, "", quantization)
        return quantization_config(quantization, model.dtype)
    found: Any = getattr(model.config, "quantization_config", None)
    if found is None or isinstance(found, BitsAndBytesConfig):
        return found
    method = method_of(model.config)
    if method != "bitsandbytes":
        raise PacaError(
            f"The checkpoint is quantized with {method}, whose memory can't be foretold; bitsandbytes' can. Measure it "
            "instead, with a short run."
        )
    return BitsAndBytesConfig.from_dict(found)


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)  # what bitsandbytes' layers replace


def _quantize(module: Any, dtype: torch.dtype) -> None:
    data = torch.empty(module.out_features, module.in_features, dtype=dtype, device=META)
    options = {name: value for name, value in vars(module.weight).items() if name not in ("CB", "SCB")}
    made: Any = type(module.weight)(data, **{**options, "requires_grad": False})
    made = made._quantize(META)  # what its move to a device calls; that to the meta device doesn't
    # bitsandbytes' classes of parameters can't be copied on the meta device.
    module.weight = nn.Parameter(made.data, requires_grad=False)
    if isinstance(getattr(made, "SCB", None), Tensor):
        module.state.CB, module.state.SCB = module.weight.data, made.SCB
    else:
        module.quant_state = made.quant_state
        for name in ("compress_statistics", "quant_type"):  # which PEFT asks for
            setattr(module.weight, name, getattr(made, name))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)

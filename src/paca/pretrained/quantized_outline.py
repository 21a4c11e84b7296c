"""A model without weights, quantized as bitsandbytes would quantize it: for what is foretold of its memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from paca.messages.errors import PacaError
from paca.pretrained.quantizing import check_not_quantized, method_of, quantization_config, require_bitsandbytes

META = torch.device("meta")


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

"""HQQ, half-quadratic quantization: `HQQLinear` of 1 to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.quantized.weight import QuantizedWeight


class HalfQuadratic(QuantizedWeight):
    """`hqq.core.quantize.HQQLinear`."""

    library, layer_class = "hqq", "HQQLinear"

    def name(self, module: Any) -> str:
        return f"hqq {module.meta['nbits']} bits"

    def packed(self, module: Any) -> Tensor:
        return module.W_q

    def shape(self, module: Any) -> tuple[int, int]:
        out_features, in_features = module.meta["shape"]  # a layer that was loaded has no other
        return out_features, in_features

    def stored_dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def dequantize(self, module: Any) -> Tensor:
        return module.dequantize().to(module.compute_dtype)

    def replace(self, module: Any, weight: Tensor) -> Any:
        from hqq.core.quantize import Quantizer

        if not module.quant_config:
            raise ValueError(
                "A merged weight can't be quantized back to HQQ: the layer does not know its settings (quant_config is "
                "empty). Use merge_and_unload(dequantize=True), or keep the adapter unmerged."
            )
        codes, meta = Quantizer.quantize(
            weight,
            device=weight.device,
            compute_dtype=module.compute_dtype,
            **module.quant_config["weight_quant_params"],
        )
        kept = module.W_q, module.meta
        meta |= {"quant_scale": False, "quant_zero": False, "compute_dtype": module.compute_dtype}
        codes, module.meta = Quantizer.cuda(codes, meta, weight.device)  # to the device's types; it may be a CPU
        module.W_q = nn.Parameter(codes, requires_grad=False)
        return kept

    def restore(self, module: Any, kept: Any) -> None:
        module.W_q, module.meta = kept

"""bitsandbytes: 4-bit weights (NF4, FP4, with or without double quantization) and int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paca.quantized.weight import QuantizedWeight


class FourBit(QuantizedWeight):
    """`Linear4bit`."""

    library, layer_class = "bitsandbytes", "Linear4bit"

    def problem(self, module: Any) -> str | None:
        if self._state(module) is None:
            return "its weight is not quantized yet: move the model to its device first"
        return None

    def adopt(self, module: Any) -> None:
        # For inference on CPUs with AVX512-BF16 the stock layer repacks its weight, into a form that does not
        # dequantize. Taking a state dict packs it back.
        if getattr(self._state(module), "packing_format_for_cpu", False):
            module.state_dict()
        vars(module).setdefault("_paca_repacks", getattr(module, "support_avx512bf16_for_cpu", False))
        module.support_avx512bf16_for_cpu = False

    def release(self, module: Any) -> None:
        module.support_avx512bf16_for_cpu = vars(module).pop("_paca_repacks", False)

    def name(self, module: Any) -> str:
        state = self._state(module)
        return str(state.quant_type) + ("" if state.nested else " without double quantization")

    def stored_dtype(self, module: Any) -> torch.dtype:
        return self._state(module).dtype

    def dtypes(self, module: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        if module.compute_type_is_set and module.compute_dtype is not None:
            return module.compute_dtype, x.dtype  # as the stock layer, under autocast too
        return super().dtypes(module, x)

    def dequantize(self, module: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, self._state(module))

    def replace(self, module: Any, weight: Tensor) -> Any:
        from bitsandbytes.nn import Params4bit

        old, old_state, settings = module.weight, module.quant_state, self._state(module)
        fresh: Any = Params4bit(
            weight.to(settings.dtype),
            requires_grad=False,
            blocksize=settings.blocksize,  # of the state: a copied weight may have lost its own
            compress_statistics=settings.nested,
            quant_type=settings.quant_type,
            quant_storage=old.dtype,
            module=module,
        )
        module.weight = fresh.to(device=weight.device)  # the move quantizes
        return old, old_state

    def restore(self, module: Any, kept: Any) -> None:
        module.weight, module.quant_state = kept

    @staticmethod
    def _state(module: Any) -> Any:
        # Moves and FSDP may lose the state that hangs on the parameter; the module has it as well.
        state = getattr(module.weight, "quant_state", None)
        return state if state is not None else module.quant_state


class EightBit(QuantizedWeight):
    """`Linear8bitLt` with int8 weights, one scale a row."""

    library, layer_class = "bitsandbytes", "Linear8bitLt"
    stock_dequantizes = False  # it rounds inputs to 8 bits too

    def problem(self, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return "it keeps 16-bit weights (has_fp16_weights=True), which it quantizes anew in every step"
        if self._codes_and_scales(module)[1] is None:
            return "its weight is not quantized yet: move the model to its device first"
        return None

    def name(self, module: Any) -> str:
        return "int8"

    def stored_dtype(self, module: Any) -> torch.dtype:
        return torch.float32  # a code times a float32 scale

    def dequantize(self, module: Any) -> Tensor:
        return self.weight(module, torch.float32)

    def weight(self, module: Any, dtype: torch.dtype) -> Tensor:
        # Straight to the matmul's type: by way of float32 three times the memory would be in use at once.
        codes, scales = self._codes_and_scales(module)
        return codes.to(dtype).mul_((scales / 127).unsqueeze(1))

    def weight_and_columns(self, module: Any, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = self._codes_and_scales(module)
        return self.weight(module, dtype), codes.index_select(1, positions) * (scales / 127).unsqueeze(1)

    def replace(self, module: Any, weight: Tensor) -> Any:
        from bitsandbytes.nn import Int8Params

        old, state = module.weight, module.state
        kept = old, old.CB, old.SCB, state.CB, state.SCB
        # It quantizes on the way from the CPU only.
        fresh: Any = Int8Params(weight.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
        module.weight = fresh.to(device=weight.device)
        state.CB = state.SCB = None
        return kept

    def restore(self, module: Any, kept: Any) -> None:
        weight, weight.CB, weight.SCB, module.state.CB, module.state.SCB = kept
        module.weight = weight

    @staticmethod
    def _codes_and_scales(module: Any) -> tuple[Tensor, Any]:
        state, weight = module.state, module.weight
        codes = state.CB if state.CB is not None else weight.data
        return codes, state.SCB if state.SCB is not None else weight.SCB

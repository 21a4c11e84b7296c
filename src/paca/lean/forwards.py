"""The forwards that lean blocks put in place of the stock ones: one small callable per kind of submodule.

A lean forward sits in its module's instance dictionary under `forward`, where `nn.Module.__call__` finds it before the
class's own. It holds its module weakly (no reference cycle, so a deleted model frees its memory at once) and follows it
through `deepcopy` and pickling.

The stock forward runs where it is as lean: without gradients, and under torch.compile, whose partitioner keeps the bf16
inputs and recomputes elementwise chains by itself (measured: the same bytes as here). Only recomputing the MLP takes
more than that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paca.lean.blocks import Block
from paca.lean.gated_linear_unit import fused_gated_linear_unit, gated_linear_unit
from paca.lean.pointwise import lean_activation
from paca.lean.recompute import note_source, recomputed
from paca.lean.rms_norm import RMSNormStyle, rms_norm

_ADDITIVE = "_paca_lean_additive"
_HIDDEN: dict[str, Callable[..., Tensor]] = {
    "gated": gated_linear_unit,
    "fused": fused_gated_linear_unit,
    "plain": lean_activation,
}


class LeanForward:
    """Base of the lean forwards."""

    lean_when_compiled = False

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """The module whose forward this is."""
        module = self._module()
        assert module is not None, "a lean forward outlived its module"
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lean = torch.is_grad_enabled() and (self.lean_when_compiled or not torch.compiler.is_compiling())
        return self.lean(*args, **kwargs) if lean else self.stock(*args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def lean(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that keeps less."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._module = weakref.ref(state["_module"])


class LeanRMSNorm(LeanForward):
    """Keeps the input in its own dtype and one float32 per row."""

    def __init__(self, module: nn.Module, style: RMSNormStyle, feeds_recomputed: bool) -> None:
        super().__init__(module)
        self.style: RMSNormStyle = style
        self.feeds_recomputed = feeds_recomputed

    def lean(self, x: Tensor) -> Tensor:
        output = self._normalize(x)
        return note_source(output, self._normalize, x) if self.feeds_recomputed else output

    def _normalize(self, x: Tensor) -> Tensor:
        module = self.module
        eps = module.variance_epsilon if self.style == "llama" else module.eps
        return rms_norm(x, module.weight, eps, self.style)


class LeanAttention(LeanForward):
    """The stock attention, given SDPA's boolean mask in the form that all layers can keep together.

    transformers hands SDPA a boolean mask (batches with padding, sliding windows); SDPA turns it into an additive one
    in the query's dtype and keeps that for the backward pass, anew in every layer: `2 * sequence` bytes per token and
    layer in half precision, as much as a hidden state of that width. Made once, all layers keep the same one.
    """

    def lean(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and self.module.config._attn_implementation == "sdpa":
            hidden_states = args[0] if args else kwargs["hidden_states"]
            kwargs["attention_mask"] = _additive_mask(mask, _query_dtype(hidden_states))
        return self.stock(*args, **kwargs)


class LeanLayerNorm(LeanForward):
    """The stock LayerNorm, which keeps its input and two float32 per row; says what its output was made from."""

    def lean(self, x: Tensor) -> Tensor:
        return note_source(self.stock(x), self.stock, x)


class LeanActivation(LeanForward):
    """The activation of an MLP without a gate."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    def lean(self, x: Tensor) -> Tensor:
        return lean_activation(x, self.activation)


class LeanMLP(LeanForward):
    """`last(hidden(first(x)))` that keeps of the wide intermediates what `hidden` needs, or, recomputing, none."""

    def __init__(self, module: nn.Module, block: Block, activation: str, recompute: bool) -> None:
        super().__init__(module)
        self.block, self.activation = block, activation
        self.recompute = self.lean_when_compiled = recompute

    def lean(self, x: Tensor) -> Tensor:
        module, block, activation = self.module, self.block, self.activation
        first = [getattr(module, name) for name in block.first]

        def segment(x: Tensor, save_only: bool) -> Tensor:
            return _HIDDEN[block.hidden](*(layer(x) for layer in first), activation, save_only)

        hidden = recomputed(segment, x, first) if self.recompute else segment(x, False)
        output = getattr(module, block.last)(hidden)
        return output if block.dropout is None else getattr(module, block.dropout)(output)


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the boolean `mask` is true and -inf elsewhere, which is what SDPA makes of it for a query of `dtype`.

    Remembered on `mask` itself, until that is changed.
    """
    version = None if mask.is_inference() else mask._version  # a mask may be a buffer that is filled anew
    known: tuple[int, Tensor] | None = getattr(mask, _ADDITIVE, None)
    if known is not None and known[0] == version and known[1].dtype == dtype:
        return known[1]
    made = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if version is not None:
        setattr(mask, _ADDITIVE, (version, made))
    return made


def _query_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype that a projection of `hidden_states` has here: autocast's, which leaves float64 alone, or its own."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type) and hidden_states.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype

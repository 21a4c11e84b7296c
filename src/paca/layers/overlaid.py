"""The adapted layer above a weight that is not written: quantized (patched or additive) or offloaded (additive)."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.columns.fingerprints import compare_values
from paca.columns.merging import as_it_is, check_merged
from paca.columns.state import AdapterColumns, State
from paca.layers.base import PacaLayer
from paca.layers.modes import offloads
from paca.layers.overlaid_weight import AdditiveWeight, PatchedWeight
from paca.quantized import quantization_of

_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer",
          "_weight_conversions")  # fmt: skip


class OverlaidLinear(PacaLayer):
    """Keeps each adapter's deltas and indices over a base layer whose weight stays as it is.

    Its base layer is what `PatchedWeight.adopt` or `AdditiveWeight.adopt` gave.
    """

    base_layer: PatchedWeight | AdditiveWeight

    def __init__(self, base_layer: PatchedWeight | AdditiveWeight) -> None:
        super().__init__(base_layer)
        self.mode = "patched" if isinstance(base_layer, PatchedWeight) else "additive"
        self._before_merge: Any = None
        self._merged: tuple[AdapterColumns, ...] = ()  # while there are `merged_adapters`
        self.loaded_deltas: dict[str, Tensor] = {}
        """What was just loaded into a dispatched model, until it has been dispatched anew."""

    def delta_shape(self, r: int) -> tuple[int, ...]:
        return self.out_features, r

    def write(self, *, compare: bool = False) -> None:
        """Let the next pass see what is active; nothing is in the weight."""
        columns = self.base_layer.columns
        columns.notice()
        if compare or columns.unaccounted:
            compare_values(columns, columns.state)
        columns.unaccounted = columns.unaccounted and not torch.is_grad_enabled()  # as of resident columns
        columns.state = State(self.wanted(), columns.base, like=columns.state)

    def job(self, *, compare: bool = False) -> Any:
        """The same; there is nothing to write together with other layers."""
        self.write(compare=compare)

    def park(self) -> None:
        """Nothing is in the weight."""

    @torch.compiler.disable  # which columns there are is a matter of run time
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs)

    # -- where the columns start --------------------------------------------------------------------------------

    @property
    def quantization_name(self) -> str | None:
        """How the base weight is quantized, as an adapter records it; None if it is only offloaded."""
        base = self.base_layer
        if isinstance(base, PatchedWeight):
            return base.quantization.name(base)
        return None if base.stock_class in (nn.Linear, Conv1D) else base.stock_class.__module__.partition(".")[0]

    @torch.no_grad()
    def start_from(self, adapter_name: str, originals: Tensor) -> None:
        """Let the adapter's columns start at `originals (out_features, r)` instead of the quantized weight's;
        `ValueError` if they have nothing to do with it. The difference goes into the delta, so that the adapter needs
        nothing besides to be the same elsewhere."""
        delta, indices = self.paca_delta[adapter_name], self.paca_indices[adapter_name]
        present = self.base_columns(indices).double()
        wanted = originals.to(present)
        distance, size = (wanted - present).norm(), wanted.norm()
        if not distance <= 0.8 * size:  # independent columns are at 1.4; 2-bit weights at about 0.5
            raise ValueError(
                f"the original columns differ from the quantized ones by {float(distance / size):.0%} of their size, "
                "so they are not what was quantized. Give the checkpoint that the model was made from."
            )
        delta.add_((wanted - present) / self.scaling[adapter_name])

    def base_columns(self, indices: Tensor) -> Tensor:
        """The base weight's columns `(out_features, r)`, without any adapter's."""
        base = self.base_layer
        device, dtype = base.weight_placement()
        if isinstance(base, PatchedWeight):
            return base.quantization.weight_and_columns(base, dtype, indices)[1]
        # A weight that only multiplies shows its columns when it multiplies unit vectors.
        units = torch.zeros(indices.numel() + 1, self.in_features, device=device, dtype=dtype)
        units[torch.arange(indices.numel(), device=device), indices] = 1
        active, self._disable_adapters = self._disable_adapters, True
        try:
            y = base(units)
        finally:
            self._disable_adapters = active
        return (y[:-1] - y[-1]).t()

    # -- merging ------------------------------------------------------------------------------------------------

    def _merge(self, columns: tuple[AdapterColumns, ...], safe: bool) -> None:
        """Dequantize, write the columns, quantize again: until `unmerge`, which is bitwise.

        The merged columns lose their 16 bits: they are quantized like the rest. `dequantized_linear` keeps them.
        """
        base = self.base_layer
        if not isinstance(base, PatchedWeight):
            raise self.unwritable(columns[0].name)
        before, dtype = self._merged if self.merged_adapters else (), base.quantization.stored_dtype(base)
        if before:
            base.quantization.restore(base, self._before_merge)
        weight = base.patched_weight(dtype, before + columns)
        try:
            if safe:
                check_merged(columns, [weight])
        except ValueError:
            if before:
                self._before_merge = base.quantization.replace(base, base.patched_weight(dtype, before))
            raise
        self._before_merge = base.quantization.replace(base, weight)
        self._merged = before + tuple(map(as_it_is, columns))
        self.merged_adapters.extend(c.name for c in columns)
        base.columns.base_changed()

    def _unmerge(self) -> None:
        base = self.base_layer
        assert isinstance(base, PatchedWeight)
        base.quantization.restore(base, self._before_merge)
        base.columns.base_changed()
        self._before_merge, self._merged = None, ()

    def _keep_merged(self) -> None:
        """The quantized weight from before is kept by nobody else."""

    def unwritable(self, adapter_name: str) -> ValueError:
        """Why an adapter can't be merged here."""
        base = self.base_layer
        if base.stock_class in (nn.Linear, Conv1D):
            reason = "accelerate offloads the layer's weight, and lends it for reading only"
        else:
            reason = f"a {base.stock_class.__module__}.{base.stock_class.__qualname__} can't give its weight as floats"
        return ValueError(
            f"Adapter {adapter_name!r} can't be merged: {reason}. Keep the adapter beside the model, or load the base "
            "model in a form that can be written."
        )

    def dequantized_linear(
        self, dtype: torch.dtype, adapter_names: list[str] | None, *, safe: bool = False
    ) -> nn.Linear:
        """An ordinary layer in `dtype` with the adapters' columns in it, rounded once. Raise `ValueError` if `safe`
        finds NaN or Inf."""
        base = self.base_layer
        assert isinstance(base, PatchedWeight)
        if self.merged:
            self.unmerge()
        columns = tuple(self.columns_of(n) for n in adapter_names or self.active_adapters if n in self.paca_delta)
        weight = base.patched_weight(dtype, columns) if columns else base.quantization.dequantize(base).to(dtype)
        if safe:
            check_merged(columns, [weight])
        return base.quantization.plain(base, weight)

    # -- devices ------------------------------------------------------------------------------------------------

    def cast_deltas(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        # PEFT dispatches a model anew after it loaded an adapter. Only `forward` brings offloaded parameters back, and
        # the holder of the deltas is not called; they are small, and stay where the layer computes.
        hook = getattr(self.paca_delta, "_hf_hook", None)
        if hook is not None:
            if getattr(hook, "weights_map", None) is not None:
                # PEFT 0.21 puts what it loaded into the new disk index by LoRA's names, where nobody finds a delta.
                hook.weights_map = ChainMap(hook.weights_map, self.loaded_deltas)
            remove_hook_from_module(self.paca_delta)
            self.paca_delta.to(self.base_layer.weight_placement()[0])
        self.loaded_deltas.clear()
        super().cast_deltas(adapter_name, autocast_adapter_dtype)


def keep_for_dispatch(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Keep what is being loaded into a model that accelerate offloads a part of, until it is dispatched anew."""
    if offloads(model):
        for name, layer in model.named_modules():
            if isinstance(layer, OverlaidLinear) and adapter_name in layer.paca_delta:
                layer.loaded_deltas[adapter_name] = tensors[f"{name}.paca_delta.{adapter_name}"]


@torch.no_grad()
def dequantize_model(model: Any, adapter_names: list[str] | None, *, safe: bool = False) -> None:
    """Put ordinary `nn.Linear` layers in place of all quantized ones, in place, in the model's dtype.

    Columns of the adapters (default: the active ones) are written into the new weights, rounded once. If `safe`, raise
    `ValueError` where one would not be finite; nothing is replaced then. The layers have passed `check_mergeable`
    (tuner/merging.py).
    """
    overlaid = [m for m in model.modules() if isinstance(m, OverlaidLinear)]
    inside = {id(m.base_layer) for m in overlaid}
    own = getattr(model, "dtype", None)  # of a transformers model; else what the weight dequantizes to
    for layer in overlaid if safe else ():
        layer.dequantized_linear(own or layer.base_layer.weight_placement()[1], adapter_names, safe=True)
    for name, module in list(model.named_modules()):
        quantization = quantization_of(module)
        if isinstance(module, OverlaidLinear):
            plain = module.dequantized_linear(own or module.base_layer.weight_placement()[1], adapter_names)
        elif quantization is not None and id(module) not in inside:
            weight = quantization.dequantize(module)
            plain = quantization.plain(module, weight.to(own or weight.dtype))
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    for mark in _MARKS:
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config

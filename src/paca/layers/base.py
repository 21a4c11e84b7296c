"""The bookkeeping of an adapted layer, as PEFT expects it of every tuner layer."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from paca.columns.folded import FOLDED_DELTA, FOLDED_INDICES, Folded, let_names_be_followed
from paca.columns.not_whole import refuse_computed, refuse_computed_delta, refuse_replaced
from paca.columns.other_weights import refuse_snapshot
from paca.columns.state import FOR_NOW, AdapterColumns, State
from paca.columns.stepping import Deltas, Job
from paca.layers.mixed_batch import Running, StepUnderway, current_mixed_batch
from paca.layers.moved import Moved
from paca.layers.peft_calls import PeftCalls, refuse_late_adapter


class PacaLayer(Moved, PeftCalls):  # a module first: FSDP2 makes subclasses of it
    """Deltas and indices per adapter, above a base layer whose weight holds those of the active ones."""

    delta_axes = "(out_features, r)"  # what the dimensions of a delta are, for messages
    delta_column_dim = 1  # the dimension of a delta that runs over its columns
    mode = "resident"  # how the columns take effect: in a subclass "patched" or "additive" (added)
    adapter_layer_names = ("paca_delta",)
    other_param_names = ("paca_indices", "r", "paca_alpha", "scaling", "folded")

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer  # the adapted module, a `ResidentWeight` (in a subclass an `OverlaidWeight`)
        self.paca_delta = Deltas()  # per adapter `(out_features, r)`, the trainable parameter, float32 unless asked
        self.paca_indices = BufferDict(persistent=True)  # per adapter `(r,)` int64, the input columns it belongs to
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}  # `paca_alpha / r`, the factor on its delta
        self.folded: dict[str, Folded] = {}  # of an adapter whose columns were rotated, those it trained before
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self.own()
        self.register_load_state_dict_post_hook(_write_what_was_loaded)
        self.out_features, self.in_features = base_layer.weight_shape()

    def own(self) -> None:
        """Make itself known to what belongs to it."""
        self.base_layer.owner = weakref.ref(self)
        self.paca_delta.belong_to(self)

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """That of `weight[:, indices]`, for a `Conv1D` of its transpose."""
        return self.out_features, r, *self.base_layer.weight.shape[2:]

    def wanted_names(self) -> list[str]:
        """The adapters whose columns the weight has to hold now."""
        if self._disable_adapters or self.merged_adapters or (Running.count and current_mixed_batch(self) is not None):
            return []
        deltas: Any = self._modules["paca_delta"]
        names = [name for name in self._active_adapter if name in deltas._parameters]
        if len(names) < len(self._active_adapter):  # some have no columns in this layer
            refuse_computed_delta([name for name in self._active_adapter if name not in names and name in deltas])
        return names

    def columns_of(self, adapter_name: str) -> AdapterColumns:
        """The adapter's delta, indices and scale as they are now, with what is folded."""
        kept: dict[str, Any] = self._modules
        columns = kept["base_layer"].columns
        delta, source = columns.local(self, adapter_name)
        indices, scale = kept["paca_indices"]._buffers[adapter_name], self.scaling[adapter_name]
        revision = columns.revisions.get(adapter_name, 0)
        return AdapterColumns(adapter_name, delta, indices, scale, revision, self.folded.get(adapter_name), source)

    def wanted(self) -> tuple[AdapterColumns, ...]:
        """What the weight has to hold now: the columns of the active adapters."""
        found = tuple([self.columns_of(name) for name in self.wanted_names()])
        return found or (FOR_NOW if Running.count and not self._disable_adapters else ())

    def stale(self) -> bool:
        """Whether the weight may hold something else."""
        kept: dict[str, Any] = self._modules  # several times faster than attributes
        base, names = kept["base_layer"], self.wanted_names()
        columns, state = base.columns, base.columns.state
        if len(state.columns) != len(names) or (columns.unaccounted and names):
            return True
        for name, c in zip(names, state.columns, strict=True):
            moved = columns.revisions.get(name, 0) != c.revision or self.folded.get(name) is not c.folded
            if c.name != name or moved or kept["paca_indices"]._buffers.get(name) is not c.indices:
                return True
        return not (self.has(state) and state.unchanged() and columns.as_left(base._parameters.get("weight")))

    def has(self, state: State) -> bool:
        """Whether deltas and scales are those of a state: while the model runs, others may be put in for a while."""
        own: Any = self._modules["paca_delta"]
        for c in state.columns:
            if self.scaling.get(c.name) != c.scale or (c.source is None and own._parameters.get(c.name) is not c.delta):
                return False
        return True

    def job(self, *, compare: bool = False) -> Job | None:
        """What is to be written, for `write_together`; `compare` if no version counter may show what changed."""
        base: Any = self._modules["base_layer"]
        columns, weight = base.columns, base.weight
        columns.check_writable(weight)
        home = columns.home_to_write(weight)
        if type(weight) is not nn.Parameter and "weight" not in base._parameters:
            refuse_computed(self.active_adapters)
        columns.notice()
        if columns.whole and type(base._parameters.get("weight")) is Tensor:
            return None  # the caller's, in the place of the layer's own (`functional_call`)
        if compare or columns.unaccounted:
            columns.compare(home)
        return columns, home, self.wanted()

    @torch.compiler.disable
    def write(self, *, compare: bool = False) -> None:
        """Make the base weight hold what is active, at once."""
        for columns, home, wanted in filter(None, [self.job(compare=compare)]):
            if not any(c.delta.is_meta for c in wanted) and not home.is_meta:
                columns.write(home, wanted)

    def stepped(self, adapter_name: str) -> Job | None:
        """Note that an optimizer changed this adapter's delta."""
        columns: Any = self._modules["base_layer"].columns  # type: ignore[union-attr]
        columns.changed(adapter_name)
        columns.trusted.add(adapter_name)
        columns.accounted()
        if self._disable_adapters or self.merged_adapters or adapter_name not in self._active_adapter:
            return None
        return self.job()

    def update_layer(
        self, adapter_name: str, indices: Tensor, paca_alpha: float, init_weights: bool, inference_mode: bool
    ) -> None:
        """Add an adapter that trains the columns `indices (r,)`: from zero, or, for tests, small random values."""
        if not self.base_layer.columns.whole:
            refuse_late_adapter(adapter_name)
        device, weight_dtype = self.base_layer.weight_placement()
        dtype = torch.promote_types(weight_dtype, torch.float32)  # float64 weights get float64 deltas
        self.r[adapter_name] = r = indices.numel()
        delta = torch.zeros(self.delta_shape(r), dtype=dtype, device=device)
        delta = delta if init_weights else nn.init.normal_(delta, std=0.02)
        self.paca_alpha[adapter_name], self.scaling[adapter_name] = paca_alpha, paca_alpha / r
        self.paca_delta[adapter_name] = nn.Parameter(delta)
        self.paca_indices[adapter_name] = indices.to(device)
        self.base_layer.columns.changed(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.write(compare=True)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()
        self.write()

    def cast_deltas(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Give the deltas float32 (or the weight's dtype if that is wider), or exactly the weight's dtype."""
        if adapter_name not in self.paca_delta:
            return
        delta, dtype = self.paca_delta[adapter_name], self.base_layer.weight_placement()[1]
        dtype = torch.promote_types(dtype, torch.float32) if autocast_adapter_dtype else dtype
        if delta.dtype != dtype:
            self.paca_delta[adapter_name] = nn.Parameter(delta.data.to(dtype), requires_grad=delta.requires_grad)
            self.write()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> Any:
        """Give back the stock module, with the adapters merged into its weight or without them."""
        if merge:
            self.merge_for_good(safe_merge, adapter_names)
        elif self.merged:
            self.unmerge()
        self.base_layer.release()
        return self.base_layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return (self.run_beside_others if Running.count else self._modules["base_layer"])(x, *args, **kwargs)  # type: ignore[misc]
        except StepUnderway:
            return self.run_beside_others(x, *args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, folded in self.folded.items():
            let_names_be_followed(self.paca_delta, self.paca_indices)
            destination[f"{prefix}{FOLDED_DELTA}.{name}"] = folded.delta
            destination[f"{prefix}{FOLDED_INDICES}.{name}"] = folded.indices

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}base_layer.weight" in state_dict and self.mode == "resident":
            refuse_snapshot(self.base_layer, state_dict, prefix)
        for name, present in self.paca_delta.items():
            delta = state_dict.get(f"{prefix}paca_delta.{name}")
            if getattr(delta, "shape", None) == present.shape:  # else it is refused
                self.base_layer.columns.changed(name)
                # The whole adapter has no folded columns, if none are given; parameters alone don't say.
                if f"{prefix}paca_indices.{name}" in state_dict:
                    self.folded.pop(name, None)
                if f"{prefix}{FOLDED_DELTA}.{name}" in state_dict:
                    self.folded[name] = Folded.taken_from(state_dict, f"{prefix}{FOLDED_DELTA}.{name}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer" and name in self._modules and not hasattr(value, "columns"):
            refuse_replaced(type(value).__name__)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={r}" for name, r in self.r.items())


def _write_what_was_loaded(layer: PacaLayer, incompatible_keys: Any) -> None:
    layer.write(compare=True)


def paca_layers(model: nn.Module) -> list[PacaLayer]:
    """The adapted layers of `model`."""
    return [m for m in model.modules() if isinstance(m, PacaLayer)]

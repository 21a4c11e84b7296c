"""The bookkeeping of an adapted layer, as PEFT expects it of every tuner layer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from paca.columns.kept import oriented
from paca.columns.state import AdapterColumns, Folded
from paca.columns.stepping import Deltas, Job
from paca.functional.train_columns import Trained, train_columns
from paca.layers.mixed_batch import MixedBatch, Running, current_mixed_batch

FOLDED_DELTA, FOLDED_INDICES = "paca_delta.paca_folded", "paca_indices.paca_folded"
"""What a whole model's state dict calls folded columns, so that PEFT takes them for an adapter's, not the base's."""


class PacaLayer(nn.Module, BaseTunerLayer):
    """Deltas and indices per adapter, above a base layer whose weight holds those of the active ones.

    Attributes:
        base_layer: the adapted module, a `ResidentWeight` (or, in a subclass, an `OverlaidWeight`).
        paca_delta: per adapter, `(out_features, r)`, the trainable parameter; float32 unless asked otherwise. For a
            convolution `(out_channels, r, *kernel)`, for an embedding `(num_embeddings, r)`.
        paca_indices: per adapter, `(r,)` int64, the input columns it belongs to; saved with the adapter.
        scaling: per adapter, the factor `paca_alpha / r` on its delta.
        folded: per adapter whose columns were rotated, those it trained before; on the CPU.
    """

    delta_axes = "(out_features, r)"
    """What the dimensions of a delta are, for messages."""
    delta_column_dim = 1
    """The dimension of a delta that runs over its columns."""

    adapter_layer_names = ("paca_delta",)
    other_param_names = ("paca_indices", "r", "paca_alpha", "scaling", "folded")
    runs_mixed_batches: ClassVar[bool] = True
    """Whether samples of one batch may have different adapters; if not, such batches are refused before they start."""
    runs_adapters_in_turn: ClassVar[bool] = False
    """Whether its weight holds one adapter's columns after the other's in a mixed batch; nobody else may write then."""
    input_axes = "(samples, ..., in_features)"
    """What the dimensions of a mixed batch's input are, for messages."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.paca_delta = Deltas()
        self.paca_indices = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.folded: dict[str, Folded] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self._own()
        self.register_load_state_dict_post_hook(_write_what_was_loaded)
        self.out_features, self.in_features = self.weight_shape()

    def _own(self) -> None:
        self.base_layer.owner = weakref.ref(self)
        self.paca_delta.belong_to(self)

    # -- the base weight ----------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How the columns take effect: "resident", "patched" or "additive" (added)."""
        return "resident"

    def weight_shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the weight, however it is stored."""
        shape = self.base_layer.weight.shape
        return shape[self.base_layer.output_dim], shape[self.base_layer.input_dim]

    def weight_placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the type of its weight."""
        return self.base_layer.weight.device, self.base_layer.weight.dtype

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """The shape of a delta of `r` columns: that of `weight[:, indices]`, a `Conv1D`'s weight transposed."""
        return self.out_features, r, *self.base_layer.weight.shape[2:]

    # -- what is active: every call that changes it writes it ---------------------------------------------------------

    def columns_of(self, adapter_name: str) -> AdapterColumns:
        """The adapter's delta, indices and scale as they are now, with what is folded."""
        base: Any = self._modules["base_layer"]
        delta, source = base.place.local(self, adapter_name)
        indices, scale = self.paca_indices[adapter_name], self.scaling[adapter_name]
        revision = base.columns.revisions.get(adapter_name, 0)
        return AdapterColumns(adapter_name, delta, indices, scale, revision, self.folded.get(adapter_name), source)

    def wanted(self) -> tuple[AdapterColumns, ...]:
        """What the weight has to hold now: the columns of the active adapters."""
        in_mixed_batch = Running.count and current_mixed_batch() is not None
        if self._disable_adapters or self.merged_adapters or in_mixed_batch:
            return ()
        return tuple(self.columns_of(name) for name in self.active_adapters if name in self.paca_delta)

    def stale(self) -> bool:
        """Whether the weight may hold something else. Usually one adapter is active, as it was written."""
        # Looked up where a plain module keeps them, here and below: several times faster than as attributes.
        kept: dict[str, Any] = self._modules
        base = kept["base_layer"]
        columns = base.columns
        state = columns.state
        if len(state.columns) != 1 or Running.count or self.merged_adapters or len(self._active_adapter) != 1:
            return bool(columns.unaccounted and state.columns) or self._differs()
        name, delta, indices, scale, revision, folded, source = state.columns[0]
        return (
            columns.unaccounted
            or self._disable_adapters
            or name != self._active_adapter[0]
            or columns.revisions.get(name, 0) != revision
            or self.scaling.get(name) != scale
            or kept["paca_indices"]._buffers.get(name) is not indices
            or (source is None and kept["paca_delta"]._parameters.get(name) is not delta)
            or self.folded.get(name) is not folded
            or not state.unchanged()
            or self._weight_replaced()
        )

    def _weight_replaced(self) -> bool:
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        return weight is None or not base.columns.sealed(base.place.home(weight))

    def _differs(self) -> bool:
        columns, wanted = self.base_layer.columns, self.wanted()
        now = columns.state.columns
        return (
            len(now) != len(wanted)
            or any(
                a.delta is not b.delta or a.indices is not b.indices or a[3:6] != b[3:6] or a.name != b.name
                for a, b in zip(now, wanted, strict=True)
            )
            or not columns.state.unchanged()
            or self._weight_replaced()
        )

    def job(self, *, compare: bool = False) -> Job:
        """What is to be written, for `write_together`.

        Args:
            compare: deltas may have been written in a way that no version counter shows.
        """
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if weight is None:  # FSDP1 puts a plain tensor in its place
            weight = base.weight
        base.place.check_writable(weight)
        columns, home = base.columns, base.place.home_to_write(weight)
        for c in columns.state.columns:  # a parameter may have been replaced (a move, a load)
            if c.name in self.paca_delta and columns.revisions.get(c.name, 0) == c.revision and self._replaced(c):
                columns.changed(c.name)
        columns.notice()
        if compare or columns.unaccounted:
            columns.compare(home)
        return columns, home, self.wanted()

    def _replaced(self, was: AdapterColumns) -> bool:
        return (
            self.base_layer.place.local(self, was.name)[0] is not was.delta
            if was.source is None
            else self.paca_delta.shard(was.name) is not was.source
        ) or self.paca_indices[was.name] is not was.indices

    def write(self, *, compare: bool = False) -> None:
        """Make the base weight hold what is active, at once."""
        columns, home, wanted = self.job(compare=compare)
        if not any(c.delta.is_meta for c in wanted) and not home.is_meta:
            columns.write(home, wanted)

    def park(self) -> None:
        """Give the base weight its pretrained columns back for the moment, bit for bit."""
        base = self.base_layer
        base.columns.park(base.place.home_to_write(base.weight), for_now=True)

    def stepped(self, adapter_name: str) -> Job | None:
        """Note that an optimizer changed this adapter's delta."""
        base: Any = self._modules["base_layer"]
        columns = base.columns
        columns.changed(adapter_name)
        columns.trusted.add(adapter_name)
        columns.unaccounted = False
        if self._disable_adapters or self.merged_adapters or adapter_name not in self._active_adapter:
            return None
        return self.job()

    def doubted(self, adapter_name: str) -> None:
        """Note that an optimizer may have changed this adapter's delta: the next pass compares."""
        columns = self.base_layer.columns
        if any(c.name == adapter_name for c in columns.state.columns):
            columns.unaccounted = True

    # -- adapters -----------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, indices: Tensor, paca_alpha: float, init_weights: bool, inference_mode: bool
    ) -> None:
        """Add an adapter that trains the columns `indices (r,)`.

        The delta starts at zero, so that the model's outputs stay as they are; with `init_weights=False` it starts at
        small random values, for tests.
        """
        if not self.base_layer.place.whole:
            raise RuntimeError(
                f"Adapter {adapter_name!r} can't be added: the weights are sharded already (FSDP2), and its deltas "
                "would not be. Adapt the model first, then shard it (fully_shard, Accelerator.prepare)."
            )
        device, weight_dtype = self.weight_placement()
        r = indices.numel()
        dtype = torch.promote_types(weight_dtype, torch.float32)  # float64 weights get float64 deltas
        delta = torch.zeros(self.delta_shape(r), dtype=dtype, device=device)
        if not init_weights:
            nn.init.normal_(delta, std=0.02)
        self.r[adapter_name] = r
        self.paca_alpha[adapter_name] = paca_alpha
        self.scaling[adapter_name] = paca_alpha / r
        self.paca_delta[adapter_name] = nn.Parameter(delta)
        self.paca_indices[adapter_name] = indices.to(device)
        self.base_layer.columns.changed(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.write()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()
        self.write()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.base_layer.columns.revisions.pop(adapter_name, None)
        self.base_layer.columns.trusted.discard(adapter_name)
        self.write()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale `adapter` to `scale` times its own `paca_alpha / r`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.paca_alpha[adapter] / self.r[adapter]
            self.write()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self.write()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without `scale`, go back to `paca_alpha / r`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                own = self.paca_alpha[adapter] / self.r[adapter]
                self.scaling[adapter] = own if scale is None else self.scaling[adapter] / scale
        self.write()

    def all_columns_of(self, adapter_name: str) -> tuple[AdapterColumns, ...]:
        """The columns that the adapter trains now, and, if it was rotated, those it trained before."""
        return self.columns_of(adapter_name).parts()

    def change(self, adapter_name: str, change: Callable[[], None]) -> None:
        """Call `change`, which replaces the adapter's delta and indices in place, while they are not in the weight."""
        self.park()
        change()
        self.base_layer.columns.changed(adapter_name)
        self.write()

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            # In a mixed batch the layer runs by itself: what it does depends on the batch.
            return self._run(x, *args, **kwargs) if Running.count else self.base_layer(x, *args, **kwargs)
        y: Tensor = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        batch = current_mixed_batch() if Running.count else None
        return y if batch is None or not self.runs_mixed_batches else self.add_mixed_batch(y, x, batch)

    @torch.compiler.disable
    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(x, *args, **kwargs)

    # -- mixed batches ------------------------------------------------------------------------------------------

    def add_mixed_batch(self, y: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add what each sample's adapter contributes.

        Args:
            y: the pretrained layer's output for `x`, one sample per row.
            x: the layer's input, one sample per row.
            batch: which sample has which adapter; adapters that are not in this layer add nothing.

        Raises:
            ValueError: if `x` does not have one sample per name.
            RuntimeError: if another thread put columns into the weight meanwhile.
        """
        if self._disable_adapters:
            return y  # as PEFT's LoRA does
        if self.mode == "resident" and self.base_layer.columns.state.columns:
            raise RuntimeError(
                "Another thread ran the model with its active adapters while this one ran a mixed batch, so the result "
                "would be wrong. Give adapter_names in every thread, or in none."
            )
        rows = self.rows_of(x, batch)
        columns = [self.columns_of(name) for name in rows]
        trained = Trained(
            tuple(self.paca_delta[name] for name in rows),
            tuple(c.indices for c in columns),
            tuple(c.scale for c in columns),
            (None,) * len(rows),
            tuple(rows.values()),
        )
        source = self.base_layer.columns.pass_of_batch(tuple(columns), batch.tag)
        return train_columns(self.base_layer.product(), x, None, None, trained, source, added_to=y)

    def rows_of(self, x: Tensor, batch: MixedBatch) -> dict[str, Tensor]:
        """The samples in `x` of each adapter of `batch` that this layer has; none if disabled.

        Raises:
            ValueError: if `x` does not have one sample per name.
        """
        if self._disable_adapters:
            return {}
        if x.dim() < self.input_dims:
            raise ValueError(f"A mixed batch needs inputs {self.input_axes}; this one is {tuple(x.shape)}.")
        return {name: rows for name, rows in batch.rows_of(x.shape[0], x.device).items() if name in self.paca_delta}

    @property
    def input_dims(self) -> int:
        """How many dimensions a mixed batch's input has at least."""
        return 2

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' columns into the base weight until `unmerge`, which is bitwise.

        Args:
            safe_merge: check first that every value is finite.
            adapter_names: default: the active ones.

        Raises:
            ValueError: if `safe_merge` finds NaN or Inf.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.paca_delta]
        if not names:
            return
        base = self.base_layer
        columns = tuple(self.columns_of(n) for n in names)
        try:
            base.columns.merge(base.place.home_to_write(base.weight), columns, safe=safe_merge)
        except ValueError:
            self.write()
            raise
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take merged columns out of the base weight again, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.columns.unmerge(self.base_layer.place.home_to_write(self.base_layer.weight))
        self.merged_adapters.clear()
        self.write()

    def has_merged(self, adapter_names: list[str] | None) -> bool:
        """Whether those of the adapters (default: of the active ones) that this layer has are merged already."""
        wanted = {name for name in adapter_names or self.active_adapters if name in self.paca_delta}
        return bool(wanted) and wanted <= set(self.merged_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give back the stock module, with the adapters merged into its weight or without them."""
        base = self.base_layer
        if merge:
            if not self.has_merged(adapter_names):
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            base.place.bring_up_to_date(base.weight)
            base.columns.seal_merge()
        elif self.merged:
            self.unmerge()
        base.release()
        return base

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole change of the weight, in the weight's shape; float32 or wider, mostly zeros."""
        refuse_sharded([self], "get_delta_weight")
        input_dim, delta = self.base_layer.input_dim, self.paca_delta[adapter]
        dense = torch.zeros(self.base_layer.weight.shape, dtype=delta.dtype, device=delta.device)
        for columns in self.all_columns_of(adapter):
            values = oriented(columns.delta.detach().to(delta) * columns.scale, input_dim)
            dense.index_copy_(input_dim, columns.indices.to(delta.device), values)
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # -- devices and dtypes -------------------------------------------------------------------------------------

    def cast_deltas(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Give the deltas float32 (or the weight's dtype if that is wider), or exactly the weight's dtype."""
        if adapter_name not in self.paca_delta:
            return
        delta, dtype = self.paca_delta[adapter_name], self.weight_placement()[1]
        if autocast_adapter_dtype:
            dtype = torch.promote_types(dtype, torch.float32)
        if delta.dtype != dtype:
            self.paca_delta[adapter_name] = nn.Parameter(delta.data.to(dtype), requires_grad=delta.requires_grad)
            self.write()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PacaLayer:
        before = {name: (id(delta), delta.dtype, delta.device) for name, delta in self.paca_delta.items()}
        super()._apply(fn, recurse)
        self._own()
        for name, delta in self.paca_delta.items():
            if before[name] != (id(delta), delta.dtype, delta.device):
                self.base_layer.columns.changed(name)
        self.write()
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also cast the deltas to the weight's dtype, which loses what training in float32 gained.
        device = device or self.weight_placement()[0]
        meta = torch.device("meta")
        if adapter_name not in self.paca_delta or self.paca_delta[adapter_name].device == meta:
            return
        for stored in (self.paca_delta, self.paca_indices):
            if stored[adapter_name].device != device:
                stored[adapter_name] = stored[adapter_name].to(device)
        self.cast_deltas(adapter_name, autocast_adapter_dtype=True)

    # -- copies, and what is folded in state dicts ------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, folded in self.folded.items():
            destination[f"{prefix}{FOLDED_DELTA}.{name}"] = folded.delta
            destination[f"{prefix}{FOLDED_INDICES}.{name}"] = folded.indices

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.paca_delta:
            if f"{prefix}paca_delta.{name}" in state_dict:  # the whole adapter: without folded columns it has none
                self.base_layer.columns.changed(name)
                self.folded.pop(name, None)
                delta = state_dict.pop(f"{prefix}{FOLDED_DELTA}.{name}", None)
                indices = state_dict.pop(f"{prefix}{FOLDED_INDICES}.{name}", None)
                if delta is not None and indices is not None:
                    self.folded[name] = Folded(indices.cpu().clone(), delta.detach().cpu().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own()
        self.write()  # the copy's weight holds what is active, as the original's did

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={r}" for name, r in self.r.items())


def _write_what_was_loaded(layer: PacaLayer, incompatible_keys: Any) -> None:
    layer.write()


def paca_layers(model: nn.Module) -> list[PacaLayer]:
    """The adapted layers of `model`."""
    return [m for m in model.modules() if isinstance(m, PacaLayer)]


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, PacaLayer]:
    """The layers of `model` that have an adapter, by their names in it."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, PacaLayer)}
    return {name: layer for name, layer in found.items() if adapter_name in layer.paca_delta}


def refuse_sharded(layers: Iterable[PacaLayer], what: str) -> None:
    """Raise if a layer's weight is sharded.

    Args:
        layers: adapted layers.
        what: can't be done to them.

    Raises:
        ValueError: saying so.
    """
    if not all(layer.base_layer.place.whole for layer in layers):
        raise ValueError(f"{what} needs whole weights, and these are sharded (FSDP2). Do it before fully_shard.")

"""The bookkeeping of an adapted layer, as PEFT expects it of every tuner layer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from paca.columns.folds import oriented, parts_of
from paca.columns.sharded import ShardableDeltas, refuse_sharded
from paca.columns.state import Columns, Folded
from paca.functional.columns_by_row import LinearProduct, RowColumns, RowProduct, add_columns_by_row
from paca.layers.mixed_batch import MixedBatch, current_mixed_batch

FOLDED_DELTA, FOLDED_INDICES = "paca_delta.paca_folded", "paca_indices.paca_folded"
"""What a whole model's state dict calls folded columns, so that PEFT takes them for an adapter's, not the base's."""


class PacaLayer(nn.Module, BaseTunerLayer):
    """Deltas and indices per adapter, above a base layer whose weight holds those of the active ones.

    Attributes:
        base_layer: the adapted module, a ``ResidentWeight`` (or, in a subclass, an ``OverlaidWeight``).
        paca_delta: per adapter, ``(out_features, r)``, the trainable parameter; float32 unless asked otherwise. For a
            convolution ``(out_channels, r, *kernel)``, for an embedding ``(num_embeddings, r)``.
        paca_indices: per adapter, ``(r,)`` int64, the input columns it belongs to; saved with the adapter.
        scaling: per adapter, the factor ``paca_alpha / r`` on its delta.
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
        self.paca_delta = ShardableDeltas()
        self.paca_indices = BufferDict(persistent=True)
        self.r: dict[str, int] = {}
        self.paca_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.folded: dict[str, Folded] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []

        base_layer.owner = weakref.ref(self)
        self.register_load_state_dict_post_hook(_push_after_load)

        self.out_features, self.in_features = self.weight_shape()

    # -- the base weight ----------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How the columns take effect: "resident", "patched" or "additive"."""
        return "resident"

    def weight_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the weight, however it is stored."""
        shape, input_dim = self.base_layer.weight.shape, self.base_layer.input_dim
        return shape[self.base_layer.output_dim], shape[input_dim]

    def weight_placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the type of its weight."""
        return self.base_layer.weight.device, self.base_layer.weight.dtype

    def delta_shape(self, r: int) -> tuple[int, ...]:
        """The shape of a delta of ``r`` columns: that of ``weight[:, indices]``, a ``Conv1D``'s weight transposed."""
        return self.out_features, r, *self.base_layer.weight.shape[2:]

    # -- adapters -----------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, indices: Tensor, paca_alpha: float, init_weights: bool, inference_mode: bool
    ) -> None:
        """Add an adapter that trains the columns ``indices (r,)``.

        The delta starts at zero, so that the model's outputs stay as they are; with ``init_weights=False`` it starts
        at small random values, for tests.
        """
        if self.base_layer.sharded is not None:
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
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._park_others()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()
        self._park_others()

    def delete_adapter(self, adapter_name: str) -> None:
        delta = self.paca_delta.get(adapter_name)
        super().delete_adapter(adapter_name)
        self._park_others()
        if delta is not None:
            self.base_layer.resident.forget(delta)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale ``adapter`` to ``scale`` times its own ``paca_alpha / r``."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.paca_alpha[adapter] / self.r[adapter]
            self.push_columns()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by ``scale``."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self.push_columns()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo ``scale_layer(scale)``; without ``scale``, go back to ``paca_alpha / r``."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                own = self.paca_alpha[adapter] / self.r[adapter]
                self.scaling[adapter] = own if scale is None else self.scaling[adapter] / scale
        self.push_columns()

    def columns_of(self, adapter_name: str) -> Columns:
        """The adapter's delta, indices and scale as they are now, with what is folded."""
        source = None if self.base_layer.sharded is None else self._shard_of(adapter_name)
        return Columns(
            adapter_name,
            self.paca_delta[adapter_name] if source is None else source._local_tensor,
            self.paca_indices[adapter_name],
            self.scaling[adapter_name],
            self.folded.get(adapter_name),
            source,
        )

    def _shard_of(self, adapter_name: str) -> Any:
        """The delta as FSDP2 shards it: this process owns those of its rows that it owns of the weight."""
        sharded, delta = self.base_layer.sharded, self.paca_delta.shard(adapter_name)
        if delta is None or delta.placements != sharded.parameter.placements:
            raise RuntimeError(
                f"Adapter {adapter_name!r} is not sharded as the weights below it are. Shard both, and "
                "adapt the model before that (fully_shard, Accelerator.prepare)."
            )
        if adapter_name in self.folded:
            raise RuntimeError(
                f"Adapter {adapter_name!r} was rotated (paca.rotate): beneath the columns it trains lie others, which "
                "can't be put into sharded weights. Train it with DistributedDataParallel, or merge it first."
            )
        return delta

    def all_columns_of(self, adapter_name: str) -> tuple[Columns, ...]:
        """The columns that the adapter trains now, and, if it was rotated, those it trained before."""
        return parts_of((self.columns_of(adapter_name),))

    def push_columns(self) -> None:
        """Tell the base layer which columns its next forward pass has to see."""
        in_mixed_batch = current_mixed_batch() is not None
        if not in_mixed_batch and self._pushed_already():
            return
        if self._disable_adapters or self.merged_adapters or in_mixed_batch:
            wanted: tuple[Columns, ...] = ()
        else:
            wanted = tuple(self.columns_of(name) for name in self.active_adapters if name in self.paca_delta)
        self.base_layer.resident.want(wanted)

    def _pushed_already(self) -> bool:
        """Whether the one active adapter is as it was pushed: the usual case, found out without building anything."""
        now, names = self.base_layer.resident.wanted, self._active_adapter
        if len(now) != 1 or len(names) != 1 or self._disable_adapters or self.merged_adapters:
            return False
        name, (_, delta, indices, scale, folded, source) = names[0], now[0]
        # Looked up where a plain module keeps them: three times faster than through ParameterDict. Whatever replaces
        # them by something that is kept elsewhere (FSDP1) is pushed the long way.
        deltas, columns = self._modules["paca_delta"], self._modules["paca_indices"]
        return (
            deltas._parameters.get(name) is delta  # type: ignore[union-attr]
            and columns._buffers.get(name) is indices  # type: ignore[union-attr]
            and self.scaling.get(name) == scale
            and self.folded.get(name) is folded
            and (source is None) == (self.base_layer.sharded is None)
        )

    def _park_others(self) -> None:
        """Put the pretrained columns back if those in the weight are not wanted any more."""
        self.push_columns()
        resident = self.base_layer.resident
        if not resident.state.holds(resident.wanted):
            resident.park(self.base_layer.home_to_write())

    def write_parked(self, write: Callable[[], None], *, hidden: bool) -> None:
        """Call ``write``, which replaces deltas and indices in place, while none of them is in the weight.

        ``hidden``: version counters won't show it.
        """
        self.base_layer.resident.write_parked(self.base_layer.home_to_write(), write, hidden=hidden)

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.base_layer(x, *args, **kwargs)
        self.push_columns()  # a parameter may have been replaced since (a move, FSDP)
        y = self.base_layer(x, *args, **kwargs)
        batch = current_mixed_batch()
        return y if batch is None or not self.runs_mixed_batches else self.add_mixed_batch(y, x, batch)

    # -- mixed batches ------------------------------------------------------------------------------------------

    def add_mixed_batch(self, y: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add what each sample's adapter contributes.

        Args:
            y: the pretrained layer's output for ``x``, one sample per row.
            x: the layer's input, one sample per row.
            batch: which sample has which adapter; adapters that are not in this layer add nothing.

        Raises:
            ValueError: if ``x`` does not have one sample per name.
            RuntimeError: if another thread put columns into the weight meanwhile.
        """
        if self._disable_adapters:
            return y  # as PEFT's LoRA does
        if self.base_layer.resident.state.columns:
            raise RuntimeError(
                "Another thread ran the model with its active adapters while this one ran a mixed batch, so the result "
                "would be wrong. Give adapter_names in every thread, or in none."
            )
        groups = self.row_columns(x, batch)
        return add_columns_by_row(
            y, x, groups, self.row_product(), batch_tag=batch.tag, after_backward=self._columns_may_change
        )

    def row_columns(self, x: Tensor, batch: MixedBatch) -> list[RowColumns]:
        """The columns of each adapter of ``batch`` that this layer has, with their samples in ``x``; none if disabled.

        Raises:
            ValueError: if ``x`` does not have one sample per name.
        """
        if self._disable_adapters:
            return []
        if x.dim() < self.input_dims:
            raise ValueError(f"A mixed batch needs inputs {self.input_axes}; this one is {tuple(x.shape)}.")
        return [
            RowColumns(rows, self.paca_delta[name], self.paca_indices[name], self.scaling[name])
            for name, rows in batch.rows_of(x.shape[0], x.device).items()
            if name in self.paca_delta
        ]

    @property
    def input_dims(self) -> int:
        """How many dimensions a mixed batch's input has at least."""
        return 2

    def row_product(self) -> RowProduct:
        """How columns contribute to some samples' outputs."""
        return LinearProduct()

    def _columns_may_change(self) -> None:
        self.base_layer.resident.suspect = True

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' columns into the base weight until ``unmerge``, which is bitwise.

        Args:
            safe_merge: check first that every value is finite.
            adapter_names: default: the active ones.

        Raises:
            ValueError: if ``safe_merge`` finds NaN or Inf.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.paca_delta]
        if not names:
            return
        columns = tuple(self.columns_of(n) for n in names)
        self.base_layer.resident.merge(self.base_layer.home_to_write(), columns, safe=safe_merge)
        self.merged_adapters.extend(names)
        self.push_columns()

    def unmerge(self) -> None:
        """Take merged columns out of the base weight again, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.resident.unmerge(self.base_layer.home_to_write())
        self.merged_adapters.clear()
        self.push_columns()

    def has_merged(self, adapter_names: list[str] | None) -> bool:
        """Whether those of the adapters (default: of the active ones) that this layer has are merged already."""
        wanted = {name for name in adapter_names or self.active_adapters if name in self.paca_delta}
        return bool(wanted) and wanted <= set(self.merged_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give back the stock module, with the adapters merged into its weight or without them."""
        if merge:
            if not self.has_merged(adapter_names):
                self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.base_layer.bring_gathered_up_to_date()
            self.base_layer.resident.seal_merge()
        elif self.merged:
            self.unmerge()
        base_layer = self.base_layer
        base_layer.release()
        return base_layer

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
            self.push_columns()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PacaLayer:
        super()._apply(fn, recurse)
        self.push_columns()
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

    # -- what is folded, in state dicts -------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, folded in self.folded.items():
            destination[f"{prefix}{FOLDED_DELTA}.{name}"] = folded.delta
            destination[f"{prefix}{FOLDED_INDICES}.{name}"] = folded.indices

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.paca_delta:
            if f"{prefix}paca_delta.{name}" in state_dict:  # the whole adapter: without folded columns it has none
                self.folded.pop(name, None)
                delta = state_dict.pop(f"{prefix}{FOLDED_DELTA}.{name}", None)
                indices = state_dict.pop(f"{prefix}{FOLDED_INDICES}.{name}", None)
                if delta is not None and indices is not None:
                    self.folded[name] = Folded(indices.cpu().clone(), delta.detach().cpu().clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base_layer.owner = weakref.ref(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={r}" for name, r in self.r.items())


def _push_after_load(layer: PacaLayer, incompatible_keys: Any) -> None:
    layer.push_columns()  # load_state_dict(assign=True) replaces parameters

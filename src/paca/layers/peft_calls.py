"""What PEFT may ask of an adapted layer besides what every training does: scales, merging, a dense change, batches with
several adapters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor

from paca.columns.kept import oriented
from paca.columns.resident import WRITING
from paca.columns.sharded import bring_deltas_up_to_date, trained_through
from paca.columns.state import AdapterColumns, State
from paca.columns.stepping import others_step
from paca.functional.train_columns import train_columns
from paca.layers.mixed_batch import MixedBatch, StepUnderway, adding, after_steps, current_mixed_batch
from paca.layers.overlaid_weight import AddedPass


class PeftCalls(BaseTunerLayer):
    """Mixin for `PacaLayer`, which has these."""

    runs_adapters_in_turn: ClassVar[bool] = False
    """Whether its weight holds one adapter's columns after the other's in a mixed batch; nobody else may write then."""
    input_axes = "(samples, ..., in_features)"
    """What the dimensions of the input are, for messages."""

    multiplies_a_matrix: ClassVar[bool] = True
    """Whether it computes `x Wᵀ`: PEFT writes such layers alone as LoRA, and takes the factors of others for theirs."""
    cast_input_dtype_enabled = True
    """PEFT's `disable_input_dtype_casting` sets it; ours never casts its input."""

    base_layer: Any
    paca_delta: Any
    paca_indices: Any
    r: dict[str, int]
    paca_alpha: dict[str, float]
    scaling: dict[str, float]
    merged_adapters: list[str]
    mode: str
    write: Any
    columns_of: Any
    wanted_names: Any
    stale: Any
    delta_shape: Any
    cast_deltas: Any
    delta_column_dim: int
    in_features: int

    @property
    def weight(self) -> Any:
        """The base weight, for code that multiplies with it itself, as torch's transformer encoders do in evaluation
        mode: with the active columns, also after something parked them for the moment."""
        if self.mode == "resident" and not torch.compiler.is_compiling() and self.stale():
            with WRITING:  # steps and writes of other threads wait
                (self.check_held if others_step([self]) else self.write)()
        return super().weight

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.base_layer.columns.changed(adapter_name)  # backward passes that are pending can't have it any more
        self.base_layer.columns.trusted.discard(adapter_name)
        self.write()

    def park(self) -> None:
        """Give the base weight its pretrained columns back for the moment, bit for bit."""
        columns = self.base_layer.columns
        columns.park(columns.home_to_write(self.base_layer.weight), for_now=True)

    def doubted(self, adapter_name: str) -> None:
        """Note that an optimizer may have changed this adapter's delta: the next pass compares."""
        if adapter_name in self.active_adapters:  # also if its columns are parked just now
            self.base_layer.columns.unaccounted = True

    # -- scales -------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale `adapter` to `scale` times its own `paca_alpha / r`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.paca_alpha[adapter] / self.r[adapter]
            self.write(compare=True)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters by `scale`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale
        self.write(compare=True)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without `scale`, go back to `paca_alpha / r`."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                own = self.paca_alpha[adapter] / self.r[adapter]
                self.scaling[adapter] = own if scale is None else self.scaling[adapter] / scale
        self.write(compare=True)

    # -- merging ------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' columns (default: the active ones') into the base weight until `unmerge`, which is bitwise.
        Raise `ValueError` if the weight can't be written, or `safe_merge` finds NaN or Inf, and `RuntimeError` if the
        tuner of an adapter above merges, which has put its own part beneath the columns."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.paca_delta]
        if not names:
            return
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, BaseTuner) and not isinstance(self, getattr(type(caller), "tuner_layer_cls", ())):
            for other in caller.model.modules():
                above = isinstance(other, BaseTunerLayer) and other is not self
                if above and any(one is self for one in other.modules()):
                    refuse_merging_both(other)
        before = len(self.merged_adapters)
        try:
            self._merge(tuple(self.columns_of(n) for n in names), safe_merge)
        except ValueError:
            del self.merged_adapters[before:]
            self.write()
            raise
        self.write()

    @torch.compiler.disable
    def _merge(self, columns: tuple[AdapterColumns, ...], safe: bool) -> None:
        self.merged_adapters.extend(c.name for c in columns)  # first: after Ctrl-C, unmerge() puts all back
        base = self.base_layer
        base.columns.merge(base.columns.home_to_write(base.weight), columns, safe=safe)
        self.merged_adapters[:] = [c.name for c in base.columns.merged]  # a signal's handler may have unmerged before

    def unmerge(self) -> None:
        """Take merged columns out of the base weight again, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._unmerge()
        self.merged_adapters.clear()
        self.write()

    @torch.compiler.disable
    def _unmerge(self) -> None:
        base = self.base_layer
        base.columns.unmerge(base.columns.home_to_write(base.weight))

    def merge_for_good(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge what is not merged yet; it can't be taken out again."""
        wanted = {name for name in adapter_names or self.active_adapters if name in self.paca_delta}
        if not wanted or not wanted <= set(self.merged_adapters):
            self.merge(safe_merge, adapter_names)
        self._keep_merged()

    def _keep_merged(self) -> None:
        self.base_layer.columns.bring_up_to_date(self.base_layer.weight)
        self.base_layer.columns.keep_merged()

    # -- the adapter's values -----------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's whole change of the weight, in the weight's shape; float32 or wider, mostly zeros."""
        refuse_sharded([self], "get_delta_weight")
        delta = self.paca_delta[adapter].detach()
        dense = delta.new_zeros(self.delta_shape(self.in_features))
        for columns in self.columns_of(adapter).parts():
            values = columns.delta.detach().to(delta) * columns.scale
            dense.index_copy_(self.delta_column_dim, columns.indices.to(delta.device), values)
        return oriented(dense, self.base_layer.input_dim)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.multiplies_a_matrix

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also cast the deltas to the weight's dtype, which loses what training in float32 gained.
        device = device or self.base_layer.weight_placement()[0]
        meta = torch.device("meta")
        if adapter_name not in self.paca_delta or self.paca_delta[adapter_name].device == meta:
            return
        for stored in (self.paca_delta, self.paca_indices):
            if stored[adapter_name].device != device:
                stored[adapter_name] = stored[adapter_name].to(device)
        self.cast_deltas(adapter_name, autocast_adapter_dtype=True)

    # -- mixed batches ------------------------------------------------------------------------------------------

    @torch.compiler.disable  # the layer runs by itself: what it does depends on the batch
    def run_beside_others(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output while mixed batches run (this thread's, or those of others), or while its weight has to be
        written and another thread steps its deltas. Raises as `rows_of`."""

        def once() -> Tensor:
            base, batch = self.base_layer, current_mixed_batch(self)
            if batch is None:
                return cast("Tensor", base(x, *args, **kwargs))
            if (base._forward_pre_hooks or base._forward_hooks) and "forward" not in vars(base):
                return cast("Tensor", adding(base, partial(self.add_mixed_batch, batch=batch))(x, *args, **kwargs))
            return self.add_mixed_batch(base(x, *args, **kwargs), x, batch)

        return after_steps(once)

    def check_held(self) -> None:
        """Raise `StepUnderway` if the weight holds other adapters than this thread wants: it was parked, or another
        thread's mixed batch wrote it."""
        if [c.name for c in self.base_layer.columns.state.columns] != self.wanted_names():
            raise StepUnderway

    def add_mixed_batch(self, y: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add to `y`, the pretrained layer's output for `x`, what each sample's adapter contributes. Raise as
        `rows_of`, and `StepUnderway` if another thread steps the deltas meanwhile."""
        if self._disable_adapters:
            return y  # as PEFT's LoRA does
        active = self.base_layer.columns
        if not active.whole and active not in batch.gathered:
            bring_deltas_up_to_date(self.paca_delta)
            batch.gathered.add(active)
        rows = self.rows_of(x, batch)
        active.notice()
        state = State(tuple(self.columns_of(name) for name in rows), active.base)
        trained = trained_through(state, self.paca_delta)._replace(rows=tuple(rows.values()))
        source = AddedPass(active, state, batch.tag)
        added = train_columns(self.base_layer.product(), x, None, None, trained, source, added_to=y)
        if others_step([self]) or any(active.revisions.get(c.name, 0) != c.revision for c in state.columns):
            raise StepUnderway
        return added

    @property
    def input_dims(self) -> int:
        """How many dimensions the input has at least: of a convolution, one fewer is a single sample."""
        return len(self.delta_shape(1))

    def rows_of(self, x: Tensor, batch: MixedBatch) -> dict[str, Tensor]:
        """The samples in `x` of each adapter of `batch` that this layer has; none if disabled. Raise `ValueError` if
        `x` does not have one sample per name."""
        if self._disable_adapters:
            return {}
        if x.dim() < self.input_dims:
            raise ValueError(f"A mixed batch needs inputs {self.input_axes}; this one is {tuple(x.shape)}.")
        return {name: rows for name, rows in batch.rows_of(x.shape[0], x.device).items() if name in self.paca_delta}


def refuse_sharded(layers: Iterable[PeftCalls], what: str) -> None:
    """Raise `ValueError` if a layer's weight is sharded: `what` can't be done to it."""
    if not all(layer.base_layer.columns.whole for layer in layers):
        raise ValueError(f"{what} needs whole weights, and these are sharded (FSDP2). Do it before fully_shard.")


def refuse_merging_both(other: object) -> None:
    """Raise `RuntimeError`: a tuner merges both columns and another method's adapter above them."""
    raise RuntimeError(
        f"An adapter of another method ({type(other).__module__}.{type(other).__name__}) lies above a layer of PaCA. "
        "Both can't be merged at once: columns would be merged over what it has changed by then. Call "
        "unmerge_adapter(), then merge() of each paca.layers.PacaLayer in the model, then this again."
    )


def refuse_late_adapter(adapter_name: str) -> None:
    """Raise `RuntimeError`: an adapter comes too late to be sharded."""
    raise RuntimeError(
        f"Adapter {adapter_name!r} can't be added: the weights are sharded already (FSDP2), and its deltas would not "
        "be. Adapt the model first, then shard it (fully_shard, Accelerator.prepare)."
    )
